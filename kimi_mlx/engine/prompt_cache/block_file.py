"""Files of the prompt cache: each block holds the KV cache rows of 256 tokens in all layers of a rank.

A block's name is a hash of the previous block's name and its own tokens. Equal prefixes therefore have equal blocks,
and a name identifies everything that the rows depend on.
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

from kimi_mlx.engine.request import FIRST_IMAGE_KEY
from kimi_mlx.errors import CacheError
from kimi_mlx.files import write_atomically

BLOCK_TOKENS = 256
"""Tokens per block: the growth step of the cache in memory. In K2 18 MB, which is large enough for the disk's full
speed and gives few files (512 for 128k tokens); an incomplete block is recomputed in about a second."""

FORMAT = 1
"""Version of the format; increment it when the contents of blocks change."""

NAME_BYTES = 16


@dataclass(frozen=True)
class BlockShape:
    """Shape of a block's rows on this rank.

    Args:
        layers: number of layers on the rank.
        width: number of values per token and layer: kv_lora_rank + qk_rope_head_dim.
        dtype: dtype of the values.
    """

    layers: int
    width: int
    dtype: mx.Dtype

    @property
    def token_bytes(self) -> int:
        """Size of one token."""
        return self.layers * self.width * self.dtype.size

    @property
    def block_bytes(self) -> int:
        """Size of a block's rows."""
        return BLOCK_TOKENS * self.token_bytes

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """Shape of a block's rows."""
        return self.layers, BLOCK_TOKENS, self.width


@dataclass(frozen=True)
class Block:
    """A block in a chain.

    Args:
        name: name of the block, in hexadecimal.
        parent: name of the previous block; the root for the first.
    """

    name: str
    parent: str

    @property
    def file_name(self) -> str:
        """File name. It contains the parent, so that listing the folder reveals the chains."""
        return f"{self.name}-{self.parent}.safetensors"


def root_of(key: str) -> str:
    """Return the parent of the first blocks of a key."""
    return _hash(f"kimi-mlx prompt cache {FORMAT}\n{key}".encode())


def chain(root: str, tokens: Sequence[int]) -> Iterator[Block]:
    """Yield the complete blocks of a sequence in order; each is hashed on demand."""
    parent = root
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        name = _hash(bytes.fromhex(parent) + _bytes_of(tokens[start : start + BLOCK_TOKENS]))
        yield Block(name, parent)
        parent = name


def write_block(path: Path, block: Block, tokens: Sequence[int], rows: mx.array) -> None:
    """Write a block atomically.

    Args:
        path: path of the file.
        block: the block.
        tokens: BLOCK_TOKENS token ids, or keys of images.
        rows: (layers, BLOCK_TOKENS, width), evaluated, because this may run in another thread than the engine.

    Raises:
        OSError: the file cannot be written.
    """
    metadata = {"block": block.name, "tokens": _bytes_of(tokens).hex(), "crc32": _checksum(rows)}
    stream = io.BytesIO()
    mx.save_safetensors(stream, {"rows": rows}, metadata)  # pyright: ignore[reportArgumentType]
    write_atomically(path, stream.getvalue())


def read_block(path: Path, block: Block, tokens: Sequence[int], shape: BlockShape) -> mx.array:
    """Return the rows of a block, (layers, BLOCK_TOKENS, width).

    Raises:
        CacheError: the file is missing, damaged, or belongs to another block.
    """
    try:
        path.stat()  # MLX does not distinguish errors
        loaded: Any = mx.load(str(path), return_metadata=True)
        rows: mx.array = loaded[0]["rows"]
        metadata: dict[str, str] = loaded[1]
        if (rows.shape, rows.dtype) != (shape.dimensions, shape.dtype):
            raise ValueError(f"rows are {rows.shape} of {rows.dtype}, not {shape.dimensions} of {shape.dtype}")
        if (metadata["block"], metadata["tokens"]) != (block.name, _bytes_of(tokens).hex()):
            raise ValueError("it belongs to other tokens or to another model")
        mx.eval(rows)
        if metadata["crc32"] != _checksum(rows):
            raise ValueError("the checksum is wrong")
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CacheError(f"block `{path}` of the prompt cache cannot be used: {error}") from error
    return rows


def _bytes_of(tokens: Sequence[int]) -> bytes:
    """Return 4 bytes per token, or 8 if the block contains keys of images, which 4 bytes cannot hold."""
    return array("I" if max(tokens) < FIRST_IMAGE_KEY else "q", tokens).tobytes()


def _checksum(rows: mx.array) -> str:
    """Return the CRC-32 (2 GB/s). It detects corruption, not manipulation."""
    return f"{zlib.crc32(memoryview(rows)):08x}"  # pyright: ignore[reportArgumentType]


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=NAME_BYTES).hexdigest()
