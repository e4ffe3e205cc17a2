"""Errors that cross process boundaries."""

from __future__ import annotations

import pickle

import pytest

from kimi_mlx.errors import ImageError, KimiMlxError, RingError, WeightsError


@pytest.mark.parametrize("kind", [KimiMlxError, WeightsError, RingError])
def test_errors_can_be_pickled(kind: type[KimiMlxError]) -> None:
    error = pickle.loads(pickle.dumps(kind("it broke", hint="fix it", rank=3)))
    assert (type(error), str(error), error.hint, error.rank) == (kind, "it broke", "fix it", 3)


def test_an_image_error_keeps_its_place() -> None:
    error = pickle.loads(pickle.dumps(ImageError("photo.png", "it is empty", hint="save it again", rank=1)))
    assert (error.place, error.reason, error.hint, error.rank) == ("photo.png", "it is empty", "save it again", 1)
    assert str(error) == "`photo.png`: it is empty"
