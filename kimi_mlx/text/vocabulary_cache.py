"""Cache the canonical pairs of large vocabularies in the user's cache folder.

Finding the pairs takes seconds for Kimi's 163,584 tokens, and the result is always the same, two bytes per token. If
the cache file is missing, broken or not writable, they are computed.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kimi_mlx.folders import cache_folder
from kimi_mlx.text.vocabulary import find_splits

# Smaller vocabularies take a fraction of a second.
CACHE_FROM_TOKENS = 30_000
FORMAT = b"kimi-mlx canonical pairs 1\n"
DIGEST_BYTES = 32


def cached_splits(tokens: Sequence[bytes], digest: str) -> list[int]:
    """Return `find_splits(tokens)`, from the cache if possible.

    Args:
        tokens: tokens in the order of their ranks.
        digest: SHA-256 of the file with the tokens, in hexadecimal.
    """
    caches = cache_folder() if len(tokens) >= CACHE_FROM_TOKENS else None
    if caches is None:
        return find_splits(tokens)
    path = caches / "tokenizers" / f"{digest}.pairs"
    splits = _read(path, tokens)
    if splits is None:
        splits = find_splits(tokens)
        _write(path, splits)
    return splits


def _read(path: Path, tokens: Sequence[bytes]) -> list[int] | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head, payload = data[: len(FORMAT) + DIGEST_BYTES], data[len(FORMAT) + DIGEST_BYTES :]
    if head != FORMAT + hashlib.sha256(payload).digest() or len(payload) != 2 * len(tokens):
        return None
    splits = _little_endian(array("H", payload))
    fits = all(split < len(token) for split, token in zip(splits, tokens, strict=True))
    return splits.tolist() if fits else None


def _write(path: Path, splits: Sequence[int]) -> None:
    """Write the file atomically."""
    if max(splits) > 0xFFFF:
        return
    payload = _little_endian(array("H", splits)).tobytes()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(FORMAT + hashlib.sha256(payload).digest() + payload)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise


def _little_endian(values: array[int]) -> array[int]:
    if sys.byteorder == "big":
        values.byteswap()
    return values
