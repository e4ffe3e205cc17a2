"""All ranks raise the error of the first rank that failed, and notice values that differ."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.errors import KimiMlxError, LinkError, MissingModelError, RingError, UsageError, WeightsError
from kimi_mlx.parallel.all_ranks import ERROR_BYTES, check_same_on_all_ranks, run_on_all_ranks
from tests.fakes import FixedGather

NO_ERROR = np.frombuffer(b" " * ERROR_BYTES, np.uint8)


class RecordingGroup(FixedGather):
    """A group that keeps what its rank contributed."""

    sent = NO_ERROR

    def gather(self, x: mx.array) -> mx.array:
        self.sent = np.array(x)
        return super().gather(x)


@pytest.mark.parametrize(
    "error", [UsageError("m", "h"), LinkError("m"), MissingModelError("é" * 5000, "\U0001f517" * 5000)]
)
def test_an_error_of_one_rank_is_raised_by_all(error: KimiMlxError) -> None:
    def fail() -> int:
        raise error

    failing = RecordingGroup(rank=1, size=3, others=[NO_ERROR, NO_ERROR])
    with pytest.raises(type(error)) as here:
        run_on_all_ranks(failing, fail)
    healthy = FixedGather(rank=0, size=3, others=[failing.sent, NO_ERROR])
    with pytest.raises(type(error)) as there:
        run_on_all_ranks(healthy, lambda: 5)
    assert type(here.value) is type(there.value) is type(error)
    assert here.value.__reduce__() == there.value.__reduce__()
    assert there.value.rank == 1
    assert there.value.message.startswith("rank 1 (`")
    assert there.value.message.endswith(error.message[:200])
    assert (there.value.hint is None) == (error.hint is None)


def test_without_an_error_the_result_is_returned() -> None:
    assert run_on_all_ranks(FixedGather(rank=1, size=3, others=[NO_ERROR, NO_ERROR]), lambda: 5) == 5


def test_an_error_that_cannot_be_decoded_names_the_rank() -> None:
    broken = np.frombuffer(b"{".ljust(ERROR_BYTES), np.uint8)
    with pytest.raises(RingError, match="rank 0 failed"):
        run_on_all_ranks(FixedGather(rank=1, size=2, others=[broken]), lambda: 5)


def test_values_that_differ_are_an_error() -> None:
    group = FixedGather(rank=0, size=2, others=[np.zeros(32, np.uint8)])
    with pytest.raises(WeightsError, match="rank 1 has another version than rank 0"):
        check_same_on_all_ranks(group, "0.1.0", "version", "install the same version")
