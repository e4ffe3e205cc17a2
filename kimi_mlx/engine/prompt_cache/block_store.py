"""A prompt cache on disk: the index of its blocks, and their eviction.

Each rank stores its own rows, and all ranks must have the same index. At the start they agree on the blocks that all of
them have (`names`, `keep`); from then on the same calls in the same order lead to the same decisions. No decision
depends on anything local to a rank, such as the progress of its disk.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from kimi_mlx.engine.prompt_cache.block_file import BLOCK_TOKENS, Block, BlockShape, chain, read_block, root_of
from kimi_mlx.engine.prompt_cache.block_folder import (
    evict_other_models,
    free_disk_bytes,
    oldest_first,
    open_folder,
    scan,
)
from kimi_mlx.engine.prompt_cache.block_writer import RESERVE_BYTES, BlockWriter, PendingBlock
from kimi_mlx.errors import CacheError, RingError

MAX_NEW_BLOCKS = 64
"""Maximum number of new blocks per call: 16k tokens, in K2 1.2 GB of copies until they are written."""

HEADER_BYTES = 4096
"""Maximum size of a file's header."""

RowsOf = Callable[[int, int], mx.array]
"""Function from a range of tokens (start, stop) to their rows, (layers, tokens, width)."""


class BlockStore:
    """The blocks of one model and one share. If they cannot be stored, it warns once and stays empty.

    Args:
        cache_dir: folder, created if missing; other models may have blocks in it, too.
        key: everything that the rows depend on and that ranks have in common.
        share: name of the folder for this rank's share.
        stamp: stamp of the weights on this host; blocks with another stamp are discarded.
        shape: shape of the rows.
        max_bytes: size limit of cache_dir.
        parts: number of ranks on this host, which share the limit.
        warn: callback for warnings, from any thread.
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
        """Blocks by name, in order of eviction: a block always comes before its parent."""
        self.capacity = 0
        self._warn = warn
        self._is_agreed = False
        self._lock: int | None = None
        try:
            self._folder, self._lock = open_folder(cache_dir, self._root, share, stamp)
            last_uses = scan(self._folder, shape.block_bytes)
            others = evict_other_models(cache_dir, self._root, max_bytes)
            free = free_disk_bytes(self._folder) - RESERVE_BYTES
            room = min((max_bytes - others) // parts, self._file_bytes * len(last_uses) + free // parts)
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
        self._blocks.update((block.name, block) for block in oldest_first(last_uses, self._root))
        for block in last_uses.keys() - set(self._blocks.values()):
            self._writer.remove(block)
        self._evict()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def _file_bytes(self) -> int:
        return self.shape.block_bytes + HEADER_BYTES

    @property
    def size_bytes(self) -> int:
        """Size of the rows of all blocks."""
        return len(self._blocks) * self.shape.block_bytes

    @property
    def limit_bytes(self) -> int:
        """Size that the rows may reach."""
        return self.capacity * self.shape.block_bytes

    def names(self) -> list[str]:
        """Return the names of the blocks, in order of eviction."""
        return list(self._blocks)

    def keep(self, names: Sequence[str], capacity: int) -> None:
        """Keep only the blocks that all ranks have. Call it once, first; a missing block is an error afterwards.

        Args:
            names: names of the blocks that all ranks have, in the order of one rank.
            capacity: smallest capacity of any rank, in blocks.
        """
        common_blocks = OrderedDict((name, self._blocks.pop(name)) for name in names)
        for block in self._blocks.values():
            self._writer.remove(block)
        self._blocks, self.capacity, self._is_agreed = common_blocks, capacity, True
        self._evict()

    def find(self, tokens: Sequence[int]) -> list[Block]:
        """Return the longest chain of stored blocks that a sequence begins with."""
        if not self._blocks:
            return []
        return list(itertools.takewhile(lambda block: block.name in self._blocks, chain(self._root, tokens)))

    def read(self, block: Block, tokens: Sequence[int]) -> mx.array:
        """Return the rows of a block from `find`, (layers, BLOCK_TOKENS, width).

        Raises:
            CacheError: the block cannot be used. It is removed, so this is reported once.
            RingError: the same if other ranks rely on the block: they must agree again.
        """
        if (pending := self._writer.waiting(block.name)) is not None:
            return pending.rows
        path = self._folder / block.file_name
        try:
            return read_block(path, block, tokens, self.shape)
        except CacheError as error:
            with contextlib.suppress(OSError):  # without its name in the index the file is ignored
                path.unlink()
            del self._blocks[block.name]
            if self._is_agreed:
                raise RingError(
                    f"{error.message}, but the other ranks rely on it",
                    hint="the ring restarts without it; if this happens again, check the disk, or omit `--cache-dir`",
                ) from error
            if not isinstance(error.__cause__, FileNotFoundError):  # never written, because the disk was full
                self._warn(f"{error.message}; it is removed, and its tokens are computed again")
            raise

    def put(self, tokens: Sequence[int], rows_of: RowsOf) -> None:
        """Store the complete blocks of a sequence: indexed immediately, written in the background.

        At most MAX_NEW_BLOCKS are stored; the others follow when the sequence returns.
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
        for block in reversed(blocks):  # so that the first block is evicted last
            self._blocks[block.name] = block
            self._blocks.move_to_end(block.name)
        self._evict()
        if blocks:
            self._writer.touch(blocks[-1])

    def close(self, limit_s: float = 10.0) -> None:
        """Write pending blocks and unlock the folder."""
        if self._lock is None:
            return
        self._writer.flush(limit_s)
        self.capacity = 0
        os.close(self._lock)
        self._lock = None

    def _write(self, block: Block, tokens: Sequence[int], rows: mx.array) -> None:
        assert (rows.shape, rows.dtype) == (self.shape.dimensions, self.shape.dtype)
        rows = mx.contiguous(rows)  # the writer thread cannot compute
        is_finite = mx.isfinite(rows).all()
        mx.async_eval(rows, is_finite)
        self._writer.write(PendingBlock(block, tokens, rows, is_finite))

    def _evict(self) -> None:
        while len(self._blocks) > self.capacity:
            self._writer.remove(self._blocks.popitem(last=False)[1])
