"""A prompt cache on disk: which blocks there are, and which go when there are too many.

On several ranks each keeps its own rows, and all must count the same blocks as there: at the start they agree on what
all of them have (`names`, `keep`), and from then on the same calls in the same order lead to the same decisions.
Nothing that only one rank knows, such as how far its disk is, takes part in them.
"""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from kimi_mlx.engine.prompt_cache.block_file import BLOCK_TOKENS, Block, BlockShape, chain, read_block, root_of
from kimi_mlx.engine.prompt_cache.block_folder import free_bytes, make_way, oldest_first, open_folder, scan
from kimi_mlx.engine.prompt_cache.block_writer import RESERVE_BYTES, BlockWriter, Pending
from kimi_mlx.errors import CacheError, RingError

MAX_NEW_BLOCKS = 64
"""Of a turn: 16 k tokens, in K2 1.2 GB of copies until they are written. The next turn goes on behind them."""

HEADER_BYTES = 4096
"""Of a block's file, at most."""

RowsOf = Callable[[int, int], mx.array]
"""The rows of the tokens from the first number up to the second: (layers, tokens, width)."""


class BlockStore:
    """Blocks of one model and share; what is in the way of keeping any is told once, and then there are none.

    Args:
        cache_dir: made if missing; other models may have blocks in it, too.
        key: everything that the rows depend on and that ranks have in common.
        share: which rows this rank has; a folder's name.
        stamp: of the weights on this host; if it has changed, older blocks are worthless.
        shape: of the rows.
        max_bytes: for all that is in cache_dir.
        parts: ranks on this host, which share that.
        warn: told what is wrong, from any thread.
    """

    def __init__(
        self,
        cache_dir: Path,
        key: str,
        share: str,
        stamp: str,
        shape: BlockShape,
        max_bytes: int,
        parts: int = 1,
        warn: Callable[[str], None] = lambda text: None,
    ):
        self.shape = shape
        self._root = root_of(key)
        self._blocks: OrderedDict[str, Block] = OrderedDict()
        """By name, those first that go first: a block always before the one that it hangs on."""
        self.capacity = 0
        self._is_agreed = False
        self._lock: int | None = None
        try:
            self._folder, self._lock = open_folder(cache_dir, self._root, share, stamp)
            found = scan(self._folder, shape.block_bytes)
            others = make_way(cache_dir, self._root, max_bytes)
            free = free_bytes(self._folder) - RESERVE_BYTES
            room = min((max_bytes - others) // parts, self._file_bytes * len(found) + free // parts)
        except BlockingIOError:
            warn(f"no prompt cache on disk: another process uses `{cache_dir}` with this model; give it its own folder")
            return
        except OSError as error:
            warn(f"no prompt cache on disk: `{error.filename or cache_dir}`: {error.strerror}")
            return
        self._writer = BlockWriter(self._folder, 2 * MAX_NEW_BLOCKS, warn)
        self.capacity = max(room // self._file_bytes, 0)
        if not self.capacity:
            warn(f"no prompt cache on disk: there is no room in `{cache_dir}` for a block of {self._file_bytes} bytes")
        self._blocks.update((block.name, block) for block in oldest_first(found, self._root))
        for block in found.keys() - set(self._blocks.values()):
            self._writer.remove(block)
        self._evict()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def _file_bytes(self) -> int:
        return self.shape.block_bytes + HEADER_BYTES

    def names(self) -> list[str]:
        """The blocks that are here, those first that go first."""
        return list(self._blocks)

    def keep(self, names: Sequence[str], capacity: int) -> None:
        """What all ranks have agreed on, once, before anything else; from here on a block that is missing is an error.

        Args:
            names: those that all ranks have, in the order of one of them.
            capacity: the smallest of all ranks, in blocks.
        """
        kept = OrderedDict((name, self._blocks.pop(name)) for name in names)
        for block in self._blocks.values():
            self._writer.remove(block)
        self._blocks, self.capacity, self._is_agreed = kept, capacity, True
        self._evict()

    def find(self, tokens: Sequence[int]) -> list[Block]:
        """The longest chain of blocks that a sequence begins with."""
        if not self._blocks:
            return []
        return list(itertools.takewhile(lambda block: block.name in self._blocks, chain(self._root, tokens)))

    def read(self, block: Block, tokens: Sequence[int]) -> mx.array:
        """The rows of a block that `find` has found: (layers, BLOCK_TOKENS, width).

        Raises:
            CacheError: it cannot be used; it is no longer counted.
            RingError: the same, but the other ranks count on it: they must agree again.
        """
        if (pending := self._writer.waiting(block.name)) is not None:
            return pending.rows
        path = self._folder / block.file_name
        try:
            return read_block(path, block, tokens, self.shape)
        except CacheError as error:
            path.unlink(missing_ok=True)
            del self._blocks[block.name]
            if self._is_agreed:
                raise RingError(
                    f"{error.message}, and the other ranks count on it",
                    hint="the ring starts again without it; if it happens again, look at the disk, "
                    "or do without `--cache-dir`",
                ) from error
            raise

    def put(self, tokens: Sequence[int], rows_of: RowsOf) -> None:
        """Keep the whole blocks of a sequence; they count as kept at once, and are written in the background.

        The first new ones, if there are many: the others when the sequence comes back.
        """
        if not self.capacity or (self._writer.has_failed and not self._is_agreed):
            return
        blocks: list[Block] = []
        new: list[tuple[int, Block]] = []
        for index, block in enumerate(chain(self._root, tokens)):
            if index == self.capacity or len(new) == MAX_NEW_BLOCKS:
                break
            blocks.append(block)
            if block.name not in self._blocks:
                new.append((index * BLOCK_TOKENS, block))
        for start, block in new:
            self._write(block, tokens[start : start + BLOCK_TOKENS], rows_of(start, start + BLOCK_TOKENS))
        for block in reversed(blocks):  # so that the first is the last to go
            self._blocks[block.name] = block
            self._blocks.move_to_end(block.name)
        self._evict()
        if blocks:
            self._writer.touch(blocks[-1])

    def close(self, limit_s: float = 10.0) -> None:
        """Write what waits, and let others have the folder."""
        if self._lock is None:
            return
        self._writer.flush(limit_s)
        self.capacity = 0
        os.close(self._lock)
        self._lock = None

    def _write(self, block: Block, tokens: Sequence[int], rows: mx.array) -> None:
        assert (rows.shape, rows.dtype) == (self.shape.dimensions, self.shape.dtype)
        rows = mx.contiguous(rows)  # the writer's thread can compute nothing
        is_finite = mx.isfinite(rows).all()
        mx.async_eval(rows, is_finite)
        self._writer.write(Pending(block, tokens, rows, is_finite))

    def _evict(self) -> None:
        while len(self._blocks) > self.capacity:
            self._writer.remove(self._blocks.popitem(last=False)[1])
