"""Errors that cross process boundaries."""

from __future__ import annotations

import pickle

import pytest

from kimi_mlx.errors import KimiMlxError, RingError, WeightsError


@pytest.mark.parametrize("kind", [KimiMlxError, WeightsError, RingError])
def test_errors_can_be_pickled(kind: type[KimiMlxError]) -> None:
    error = pickle.loads(pickle.dumps(kind("it broke", hint="fix it", rank=3)))
    assert (type(error), str(error), error.hint, error.rank) == (kind, "it broke", "fix it", 3)
