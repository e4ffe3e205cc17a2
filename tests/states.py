"""States of a model for tests of draft models."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from kimi_mlx.model.decoder import Model, SequenceSlice


def captured_states(model: Model, ids: Sequence[int], layers: Sequence[int]) -> mx.array:
    """Return the captured states of tokens, (1, L, layers * D)."""
    model.capture(layers)
    model.hidden(mx.array([ids]), [SequenceSlice(model.make_cache(), len(ids), len(ids))])
    captured = model.captured
    model.capture(())
    assert captured is not None
    return captured.array()
