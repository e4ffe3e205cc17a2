"""The mixture of experts: both ways to weigh the experts agree."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model import moe
from kimi_mlx.model.config import load_config
from kimi_mlx.model.device_traits import METAL_TUNING
from kimi_mlx.weights.assemble import load_model

FOLDER = Path(__file__).parents[3] / "kimi_mlx" / "models" / "kimi-mini"


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("has_residual", [True, False])
def test_weights_in_the_activation_equal_weights_of_the_outputs(
    dtype: mx.Dtype, tokens: int, has_residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(FOLDER, load_config(FOLDER), dtype)
    mlp = model.layers[1].mlp
    assert isinstance(mlp, moe.MoE)
    x = mx.random.normal((1, tokens, model.config.hidden_size), key=mx.random.key(tokens)).astype(dtype)
    residual = 2 * x if has_residual else None
    ids, scores = mlp.gate(x)
    outputs: list[np.ndarray] = []
    for is_fused in (False, True):
        monkeypatch.setattr(moe, "weighs_activations", lambda kind, is_fused=is_fused: is_fused)
        outputs.append(np.array(mlp(x, residual, ids, scores).astype(mx.float32)))
    tolerance = 1e-5 if dtype == mx.float32 else 8e-2
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)


def test_a_gpu_sorts_choices_from_four_per_expert_on() -> None:
    model = load_model(FOLDER, load_config(FOLDER), mx.float32)
    mlp = model.layers[1].mlp
    assert isinstance(mlp, moe.MoE)
    assert mlp.sort_min_choices == 64
    model.tune(METAL_TUNING)
    assert mlp.sort_min_choices == 4 * (16 + 1)
