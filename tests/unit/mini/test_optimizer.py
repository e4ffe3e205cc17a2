"""MuonClip and the router's bias."""

from __future__ import annotations

import mlx.core as mx
import pytest

from scripts.mini.architecture import Shape
from scripts.mini.averaging import StepMetrics, average, clip_by_norm
from scripts.mini.optimizer import QK_CLIP_THRESHOLD, WEIGHT_DECAY, MuonClip, balance_experts, qk_clip

MATRIX, STACK = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.switch_mlp.up_proj.weight"
ROUTER, HEAD = "model.layers.1.mlp.gate.weight", "lm_head.weight"
SHAPE = Shape(64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, n_routed_experts=4)


@pytest.fixture
def parameters() -> dict[str, mx.array]:
    mx.random.seed(0)
    shapes = {MATRIX: (48, 32), STACK: (4, 48, 32), ROUTER: (4, 32), HEAD: (64, 32), "model.norm.weight": (32,)}
    return {name: mx.random.normal(shape) for name, shape in shapes.items()}


def update_of(name: str, before: dict[str, mx.array], after: dict[str, mx.array], rate: float) -> mx.array:
    return (before[name] * (1 - rate * WEIGHT_DECAY) - after[name]) / rate


def test_muon_updates_are_orthogonal_and_as_large_as_adamws(parameters: dict[str, mx.array]):
    gradients = {name: mx.random.normal(value.shape) for name, value in parameters.items()}
    after = MuonClip(parameters).step(parameters, gradients, learning_rate=0.01, step=1)
    for update in (update_of(MATRIX, parameters, after, 0.01), *update_of(STACK, parameters, after, 0.01)):
        root_mean_square = float(mx.sqrt(mx.square(update).mean()))
        assert root_mean_square == pytest.approx(0.2, rel=0.2)
        scaled = update / (0.2 * 48**0.5)
        gram = scaled.T @ scaled
        # Five Newton-Schulz steps bring singular values near one, not to it.
        assert float(mx.diag(gram).min()) > 0.4
        assert float(mx.diag(gram).max()) < 1.6
        assert float(mx.abs(gram - mx.diag(mx.diag(gram))).max()) < 0.5


def test_a_stack_is_updated_like_its_matrices_alone(parameters: dict[str, mx.array]):
    gradients = {name: mx.random.normal(value.shape) for name, value in parameters.items()}
    together = MuonClip(parameters).step(parameters, gradients, 0.01, 1)[STACK]
    for expert in range(4):
        one = {MATRIX: parameters[STACK][expert]}
        alone = MuonClip(one).step(one, {MATRIX: gradients[STACK][expert]}, 0.01, 1)[MATRIX]
        assert mx.allclose(together[expert], alone, atol=1e-5)


def test_adamw_updates_the_rest(parameters: dict[str, mx.array]):
    gradients = {name: mx.random.normal(value.shape) for name, value in parameters.items()}
    after = MuonClip(parameters).step(parameters, gradients, learning_rate=0.01, step=1)
    for name in (ROUTER, HEAD, "model.norm.weight"):
        # The first step of Adam is the sign of the gradient.
        assert mx.allclose(parameters[name] - after[name], 0.01 * mx.sign(gradients[name]), atol=1e-4)


def test_qk_clip_brings_a_head_back_to_the_threshold_and_leaves_the_others():
    nope, rope = SHAPE.qk_nope_head_dim, SHAPE.qk_rope_head_dim
    name = "model.layers.1.self_attn"
    before = {
        f"{name}.q_b_proj.weight": mx.ones((2 * (nope + rope), 8)),
        f"{name}.embed_q.weight": mx.ones((2, SHAPE.kv_lora_rank, nope)),
    }
    after = dict(before)
    largest = mx.array([[1.0, 2.0], [3.0, 4 * QK_CLIP_THRESHOLD]])
    assert qk_clip(after, largest, SHAPE) == ["1.1"]
    queries = after[f"{name}.q_b_proj.weight"].reshape(2, nope + rope, 8)
    assert mx.all(queries[0] == 1)
    assert mx.allclose(queries[1, :nope], mx.array(0.5))
    assert mx.allclose(queries[1, nope:], mx.array(0.25))
    assert mx.allclose(after[f"{name}.embed_q.weight"][1], mx.array(0.5))
    assert mx.all(after[f"{name}.embed_q.weight"][0] == 1)


def test_the_bias_of_underused_experts_rises():
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    parameters = {name: mx.zeros(4)}
    balance_experts(parameters, mx.array([[10.0, 30.0, 20.0, 20.0]]), SHAPE)
    lifted, lowered, *even = (float(bias) for bias in parameters[name])
    assert lifted > 0
    assert lowered < 0
    assert even == [0.0, 0.0]


def test_averaging_over_one_rank_changes_nothing():
    gradients = {"b": mx.arange(6.0).reshape(2, 3), "a": mx.ones(4)}
    own = StepMetrics(2.5, 100, 1.5, mx.ones((2, 4)), mx.arange(4.0).reshape(2, 2))
    averaged, common = average(gradients, own, mx.distributed.init())
    assert all(mx.array_equal(averaged[name], gradients[name]) for name in gradients)
    assert (common.loss, common.tokens, common.seconds) == (2.5, 100, 1.5)
    assert mx.array_equal(common.logits, own.logits)


def test_gradients_are_clipped_together():
    clipped, norm = clip_by_norm({"a": mx.array([3.0]), "b": mx.array([4.0])}, limit=1.0)
    assert norm == pytest.approx(5.0)
    assert float(clipped["a"][0]) == pytest.approx(0.6, rel=1e-4)
