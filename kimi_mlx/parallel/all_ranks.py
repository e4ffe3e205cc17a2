"""Run the same function on every rank; if it fails on one, it fails on all. Compare values across ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import KimiMlxError, WeightsError
from kimi_mlx.parallel.group import Group

Result = TypeVar("Result")

ERROR_BYTES = 4096


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
    """On every rank, raise the failure of the first rank that has one."""
    if group.size == 1:
        if failure is not None:
            raise failure
        return
    text = "" if failure is None else json.dumps({"message": failure.message[:2000], "hint": failure.hint})
    row = np.frombuffer(text.encode()[:ERROR_BYTES].ljust(ERROR_BYTES), np.uint8)
    for rank, row_bytes in enumerate(np.array(group.gather(mx.array(row)))):
        if encoded := row_bytes.tobytes().strip():
            try:
                error = json.loads(encoded)
            except ValueError:  # truncated
                error = {"message": "failed", "hint": None}
            kind = type(failure) if failure is not None and rank == group.rank else WeightsError
            raise kind(f"host {rank}: {error['message']}", error["hint"]) from failure


def check_same_on_all_ranks(group: Group, text: str, name: str, hint: str) -> None:
    """Check that a text is the same on all ranks.

    Raises:
        WeightsError: it differs on a rank.
    """
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    rows = np.array(group.gather(mx.array(digest)))
    for rank, row in enumerate(rows):
        if not np.array_equal(row, rows[0]):
            raise WeightsError(f"rank {rank} has another {name} than rank 0", hint)
