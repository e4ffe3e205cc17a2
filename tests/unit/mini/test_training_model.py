"""The training model against mlx-lm's `deepseek_v3`; quantization and checkpoints."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from scripts.mini import checkpoint, model
from scripts.mini.architecture import Shape
from scripts.mini.export import export, model_config
from scripts.mini.quantize import fake_quantize, quantize
from scripts.mini.training import learning_rate_at, part_at
from scripts.mini.vocabulary import tokenizer_config

VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def parameters() -> dict[str, mx.array]:
    parameters = model.init_parameters(Shape(VOCAB_SIZE), seed=0)
    for name, value in parameters.items():
        if name.endswith("e_score_correction_bias"):
            parameters[name] = mx.random.normal(value.shape, scale=0.1)
    return parameters


def logits_of(parameters: dict[str, mx.array], tokens: mx.array, segments: mx.array) -> mx.array:
    positions = mx.arange(tokens.size)
    h, _, _ = model.hidden_states(parameters, tokens, segments, positions, Shape(VOCAB_SIZE))
    return (h @ parameters["lm_head.weight"].T).reshape(*tokens.shape, -1)


@pytest.fixture
def _no_token_is_dropped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "CAPACITY", 4.0)


@pytest.mark.usefixtures("_no_token_is_dropped")
def test_logits_equal_those_of_mlx_lm(parameters: dict[str, mx.array]):
    from mlx_lm.models.deepseek_v3 import Model, ModelArgs

    reference = Model(ModelArgs.from_dict(model_config(VOCAB_SIZE)))
    reference.load_weights(list(parameters.items()), strict=True)
    tokens = mx.random.randint(0, VOCAB_SIZE, (2, 48))
    expected = reference(tokens)
    ours = logits_of(parameters, tokens, mx.zeros_like(tokens))
    assert float(mx.abs(ours - expected).max() / mx.abs(expected).max()) < 2e-5


@pytest.mark.usefixtures("_no_token_is_dropped")
def test_packed_dialogues_do_not_attend_to_each_other(parameters: dict[str, mx.array]):
    tokens = mx.random.randint(0, VOCAB_SIZE, (1, 40))
    segments = mx.array([[0] * 24 + [1] * 16])
    packed = logits_of(parameters, tokens, segments)
    alone = logits_of(parameters, tokens[:, 24:], mx.zeros((1, 16), dtype=mx.int32))
    assert mx.allclose(packed[:, 24:], alone, atol=1e-4)


def test_gradients_of_experts_equal_those_of_a_dense_evaluation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "CAPACITY", 4.0)
    shape = Shape(VOCAB_SIZE, hidden_size=32, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2)
    names = [f"m.switch_mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    p = {name: mx.random.normal((4, 32, 32), scale=0.2) for name in names}
    p |= {"m.gate.weight": mx.random.normal((4, 32)), "m.gate.e_score_correction_bias": mx.zeros(4)}
    x = mx.random.normal((12, 32))

    def sparse(p: dict[str, mx.array], x: mx.array) -> mx.array:
        return mx.square(model.experts(p, "m", x, shape)[0]).sum()

    def dense(p: dict[str, mx.array], x: mx.array) -> mx.array:
        weights, _ = model.route(p, "m", x, shape)
        gate, up, down = (p[name].swapaxes(-1, -2) for name in names)
        hidden = x @ gate
        out = (hidden * mx.sigmoid(hidden) * (x @ up)) @ down  # (E, T, D)
        return mx.square((out * weights.T[..., None]).sum(axis=0)).sum()

    ours, theirs = mx.grad(sparse, argnums=(0, 1))(p, x), mx.grad(dense, argnums=(0, 1))(p, x)
    assert mx.allclose(ours[1], theirs[1], rtol=1e-3, atol=1e-4)
    for name in [*names, "m.gate.weight"]:
        assert mx.allclose(ours[0][name], theirs[0][name], rtol=1e-3, atol=1e-4), name


def test_training_rounds_as_the_export_does(parameters: dict[str, mx.array]):
    name = "model.layers.1.self_attn.q_a_proj"
    tensors = quantize(parameters)
    stored = mx.dequantize(tensors[f"{name}.weight"], tensors[f"{name}.scales"], tensors[f"{name}.biases"], 32, 4)
    assert mx.array_equal(fake_quantize(parameters)[f"{name}.weight"], stored)
    assert "model.layers.1.mlp.gate.scales" not in tensors


def test_a_checkpoint_loads_and_exports(tmp_path: Path, parameters: dict[str, mx.array]):
    assert checkpoint.load(tmp_path) is None
    checkpoint.save(tmp_path, parameters, {"x:m": mx.ones(3)}, {"step": 7, "tokens": 9})
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert all(mx.array_equal(loaded[0][name], value) for name, value in parameters.items())
    assert list(loaded[1]) == ["x:m"]
    assert loaded[2] == {"step": 7, "tokens": 9}
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    for name in ("tiktoken.model", "tokenizer_config.json"):
        (vocabulary / name).write_text("")
    written = export(tmp_path, vocabulary, tmp_path / "out")
    assert written < 12e6
    assert not list((tmp_path / "out").glob(".part*"))


def test_the_learning_rate_rises_stays_constant_and_falls():
    assert learning_rate_at(0.0, 0, 3e-3) < 1e-4
    assert learning_rate_at(0.5, 1000, 3e-3) == pytest.approx(3e-3)
    assert 0 < learning_rate_at(1.0, 5000, 3e-3) < 1e-4
    assert [part_at(fraction) for fraction in (0.0, 0.5, 0.9)] == [0, 1, 2]


def test_tokenizer_config_names_the_tokens_of_the_model_config():
    config, decoder = model_config(VOCAB_SIZE), tokenizer_config(VOCAB_SIZE - 256)["added_tokens_decoder"]
    assert decoder[str(config["eos_token_id"])]["content"] == "[EOS]"
    assert decoder[str(config["pad_token_id"])]["content"] == "[PAD]"
