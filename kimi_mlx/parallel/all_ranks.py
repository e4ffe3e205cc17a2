"""What all processes of a group do alike: an error of one is an error of all, and what must be equal is compared."""

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
    """Do the same in every process; what fails in one fails in all, in the same words.

    Raises:
        KimiMlxError: of the first process that failed.
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
    """Raise the failure of the first process that has one, in every process."""
    if group.size == 1:
        if failure is not None:
            raise failure
        return
    text = "" if failure is None else json.dumps({"message": failure.message[:2000], "hint": failure.hint})
    row = np.frombuffer(text.encode()[:ERROR_BYTES].ljust(ERROR_BYTES), np.uint8)
    for rank, told in enumerate(np.array(group.gather(mx.array(row)))):
        if said := told.tobytes().strip():
            try:
                words = json.loads(said)
            except ValueError:  # cut off
                words = {"message": "has failed", "hint": None}
            kind = type(failure) if failure is not None and rank == group.rank else WeightsError
            raise kind(f"host {rank}: {words['message']}", words["hint"]) from failure


def check_same_on_all_ranks(group: Group, text: str, what: str, hint: str) -> None:
    """Compare a text over the group.

    Raises:
        WeightsError: a process has another one.
    """
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    rows = np.array(group.gather(mx.array(digest)))
    for rank, row in enumerate(rows):
        if not np.array_equal(row, rows[0]):
            raise WeightsError(f"rank {rank} has another {what} than rank 0", hint)
