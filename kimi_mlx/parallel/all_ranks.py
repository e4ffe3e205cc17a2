"""Run the same function on every rank; if it fails on one, it fails on all. Compare values across ranks."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from kimi_mlx import errors
from kimi_mlx.errors import KimiMlxError, RingError, WeightsError
from kimi_mlx.parallel.group import Group, gather_on_host

Result = TypeVar("Result")

ERROR_BYTES = 4096
"""Bytes that each rank contributes to the exchange of errors."""


def run_on_all_ranks(group: Group, work: Callable[[], Result]) -> Result:
    """Run a function on every rank; if it fails on one, raise the same error on all.

    Raises:
        KimiMlxError: the error of the first rank that failed.
    """
    if group.size == 1:
        return work()
    result: Result | None = None
    failure: KimiMlxError | None = None
    try:
        result = work()
    except KimiMlxError as error:
        failure = error
    raise_if_any_failed(group, failure)
    assert failure is None
    return result  # pyright: ignore[reportReturnType]


def raise_if_any_failed(group: Group, failure: KimiMlxError | None) -> None:
    """On every rank, raise the failure of the first rank that has one: the same class, message and hint everywhere."""
    if group.size == 1:
        if failure is not None:
            raise failure
        return
    encoded = b"" if failure is None else _encode(failure)
    rows = gather_on_host(group, np.frombuffer(encoded.ljust(ERROR_BYTES), np.uint8))
    for rank, row in enumerate(rows):
        if text := row.tobytes().strip():
            raise _decode(text, rank) from failure


def _encode(failure: KimiMlxError) -> bytes:
    """Encode an error in at most ERROR_BYTES; long messages and hints are cut."""
    for limit in (ERROR_BYTES, ERROR_BYTES // 4, ERROR_BYTES // 16):  # a character takes up to 6 bytes
        texts = (type(failure).__name__, platform.node()[:100], failure.message, failure.hint)
        text = json.dumps([value and value[:limit] for value in texts], ensure_ascii=False)
        encoded = text.encode(errors="replace")
        if len(encoded) <= ERROR_BYTES:
            break
    return encoded  # pyright: ignore[reportPossiblyUnboundVariable]


def _decode(text: bytes, rank: int) -> KimiMlxError:
    """Return the error of a rank, with the name of its host."""
    try:
        name, host, message, hint = json.loads(text)
    except ValueError:  # of another version of kimi-mlx
        return RingError(f"rank {rank} failed, but its error cannot be read", hint="run `kimi-mlx doctor`", rank=rank)
    kind = vars(errors).get(name, KimiMlxError)
    return kind(f"rank {rank} (`{host}`): {message}", hint, rank)


def check_same_on_all_ranks(group: Group, text: str, name: str, hint: str) -> None:
    """Check that a text is the same on all ranks.

    Raises:
        WeightsError: it differs on a rank.
    """
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    rows = gather_on_host(group, digest)
    for rank, row in enumerate(rows):
        if not np.array_equal(row, rows[0]):
            raise WeightsError(f"rank {rank} has another {name} than rank 0", hint)
