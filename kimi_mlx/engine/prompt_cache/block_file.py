"""One block of a prompt cache as a file: the rows of 256 tokens in all layers of a rank, and how it is named.

A block is named by a chain of hashes: that of the block before it, and its own tokens. So equal beginnings of prompts
have equal blocks, and a name says everything that the rows depend on.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from kimi_mlx.errors import CacheError
from kimi_mlx.files import write_atomically

BLOCK_TOKENS = 256
"""As many as the cache in memory grows by. In K2 18 MB: large enough for the disk's full speed, few enough files (512
for a context of 128 k), and what a turn leaves over is computed again in about a second."""

FORMAT = 1
"""Raised when blocks are written otherwise, or mean something else."""

NAME_BYTES = 16


@dataclass(frozen=True)
class BlockShape:
    """What the rows of a token are on this rank.

    Args:
        layers: held here.
        width: numbers a token and layer: kv_lora_rank + qk_rope_head_dim.
        dtype: of the numbers.
    """

    layers: int
    width: int
    dtype: mx.Dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.layers * self.width * self.dtype.size

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's rows."""
        return BLOCK_TOKENS * self.token_bytes

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """Of a block's rows."""
        return self.layers, BLOCK_TOKENS, self.width


@dataclass(frozen=True)
class Block:
    """A block's place in the chain.

    Args:
        name: its own, in hexadecimal.
        parent: the name of the one before it; of the first one the root.
    """

    name: str
    parent: str

    @property
    def file_name(self) -> str:
        """It has the parent in it, so that a folder's listing is enough to see the chains."""
        return f"{self.name}-{self.parent}.safetensors"


def root_of(key: str) -> str:
    """The name that all chains of a key begin with."""
    return _hash(f"kimi-mlx prompt cache {FORMAT}\n{key}".encode())


def chain(root: str, tokens: Sequence[int]) -> Iterator[Block]:
    """The whole blocks of a sequence in their order, each hashed when it is asked for."""
    parent = root
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        name = _hash(bytes.fromhex(parent) + _bytes_of(tokens[start : start + BLOCK_TOKENS]))
        yield Block(name, parent)
        parent = name


def write_block(path: Path, block: Block, tokens: Sequence[int], rows: mx.array) -> None:
    """Write a block, whole or not at all.

    Args:
        path: of the file.
        block: its name.
        tokens: BLOCK_TOKENS.
        rows: (layers, BLOCK_TOKENS, width), evaluated: this may be another thread than the engine's.

    Raises:
        OSError: as the disk says.
    """
    metadata = {"block": block.name, "tokens": _bytes_of(tokens).hex(), "crc32": _checksum(rows)}
    stream = io.BytesIO()
    mx.save_safetensors(stream, {"rows": rows}, metadata)  # pyright: ignore[reportArgumentType]
    write_atomically(path, stream.getvalue())


def read_block(path: Path, block: Block, tokens: Sequence[int], shape: BlockShape) -> mx.array:
    """The rows of a block: (layers, BLOCK_TOKENS, width).

    Raises:
        CacheError: it is not there, or not what it should be, to the last bit.
    """
    try:
        path.stat()  # MLX has one error for all
        loaded: Any = mx.load(str(path), return_metadata=True)
        rows: mx.array = loaded[0]["rows"]
        metadata: dict[str, str] = loaded[1]
        if (rows.shape, rows.dtype) != (shape.dimensions, shape.dtype):
            raise ValueError(f"rows are {rows.shape} of {rows.dtype}, not {shape.dimensions} of {shape.dtype}")
        if (metadata["block"], metadata["tokens"]) != (block.name, _bytes_of(tokens).hex()):
            raise ValueError("it is of other tokens, or of another model")
        mx.eval(rows)
        if metadata["crc32"] != _checksum(rows):
            raise ValueError("the checksum is wrong")
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CacheError(f"block `{path}` of the prompt cache cannot be used: {error}") from error
    return rows


def _bytes_of(tokens: Sequence[int]) -> bytes:
    return array("I", tokens).tobytes()


def _checksum(rows: mx.array) -> str:
    """2 GB/s; it finds what a disk or a copy has garbled, and is no defence against somebody who means it."""
    return f"{zlib.crc32(memoryview(rows)):08x}"  # pyright: ignore[reportArgumentType]


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=NAME_BYTES).hexdigest()
