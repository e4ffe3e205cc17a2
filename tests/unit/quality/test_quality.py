"""Models that run layer by layer, comparisons of them, and the statistics of their inputs."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.moe import MoE
from kimi_mlx.quality.activations import record_inputs
from kimi_mlx.quality.compare import compare
from kimi_mlx.quality.layerwise import LayerwiseModel
from kimi_mlx.quality.windows import divide
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.conversion import open_conversion
from kimi_mlx.weights.convert import convert
from kimi_mlx.weights.convert_options import ConvertOptions
from kimi_mlx.weights.importance import Importance, norm_digest, write_importance
from tests.checkpoints import FORMATS, load_golden, write_checkpoint

WINDOWS = [tuple((7 * i + 3) % 61 for i in range(40)), tuple((5 * i + 1) % 61 for i in range(17))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a float checkpoint, and one in which shared experts have other bits than routed ones."""
    folder = tmp_path_factory.mktemp("quality")
    golden = load_golden("k2")
    plain = write_checkpoint(folder / "float", golden.config, golden.seed)
    convert(open_conversion(plain, ConvertOptions(bits=8, expert_bits=6, group_size=32)), folder / "mixed")
    return {"float": plain, "mixed": folder / "mixed", "fp8": FORMATS / "fp8", "int4-k2.5": FORMATS / "int4-k2.5"}


def layerwise(folder: Path) -> LayerwiseModel:
    return LayerwiseModel(folder, load_config(folder), mx.float32)


def whole(folder: Path) -> Model:
    return load_model(folder, load_config(folder), mx.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("name", ["float", "mixed", "fp8", "int4-k2.5"])
def test_layer_by_layer_gives_the_logits_of_the_whole_model(name: str, folders: dict[str, Path]) -> None:
    model, states = whole(folders[name]), layerwise(folders[name]).hidden(WINDOWS)
    head = layerwise(folders[name]).head()
    for window, state in zip(WINDOWS, states, strict=True):
        expected = log_softmax(np.array(model(mx.array([window]))[0]))
        np.testing.assert_allclose(np.array(head.log_probabilities(state[0])), expected, atol=2e-4)


@pytest.mark.slow
def test_only_one_layer_is_in_memory(tmp_path: Path) -> None:
    config = {**load_golden("k2").config, "num_hidden_layers": 6, "n_routed_experts": 64}
    folder = write_checkpoint(tmp_path / "deep", config, 1)
    model = layerwise(folder)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model.hidden(WINDOWS)
    assert mx.get_peak_memory() - before < 0.45 * model.size_bytes


def test_a_comparison_has_the_values_of_numpy(folders: dict[str, Path]) -> None:
    calls: list[tuple[int, int]] = []
    result = compare(
        layerwise(folders["float"]),
        layerwise(folders["mixed"]),
        WINDOWS,
        lambda done, total: calls.append((done, total)),
    )
    models = [whole(folders[name]) for name in ("float", "mixed")]
    kl, losses, agreements = [], [], []
    for window in WINDOWS:
        a, b = (log_softmax(np.array(model(mx.array([window]))[0]))[:-1] for model in models)
        kl.append((np.exp(a) * (a - b)).sum(axis=-1))
        losses.append([-log[np.arange(len(window) - 1), window[1:]] for log in (a, b)])
        agreements.append(a.argmax(axis=-1) == b.argmax(axis=-1))
    divergence, loss = np.concatenate(kl), np.concatenate(losses, axis=1).mean(axis=1)
    assert result.positions == len(divergence) == sum(map(len, WINDOWS)) - len(WINDOWS)
    found = (result.kl_mean, result.kl_p90, result.kl_max, result.perplexity_a, result.perplexity_b)
    expected = (divergence.mean(), np.quantile(divergence, 0.9), divergence.max(), *(math.exp(value) for value in loss))
    assert found == pytest.approx(expected, rel=2e-3)
    assert result.top1_agreement == np.concatenate(agreements).mean()
    layers = load_config(folders["float"]).num_hidden_layers
    assert calls[0] == (0, 2 * layers)
    assert calls[-1] == (2 * layers, 2 * layers)


def test_a_model_equals_itself(folders: dict[str, Path]) -> None:
    result = compare(layerwise(folders["mixed"]), layerwise(folders["mixed"]), WINDOWS, lambda done, total: None)
    assert (result.kl_max, result.top1_agreement) == (0, 1)
    assert result.perplexity_a == result.perplexity_b


def test_damaged_weights_are_an_error(tmp_path: Path) -> None:
    golden = load_golden("k2")
    folder = write_checkpoint(tmp_path / "model", golden.config, golden.seed)
    model = layerwise(folder)
    info = model.reader.checkpoint.tensors["model.layers.1.input_layernorm.weight"]
    with info.file.open("r+b") as stream:
        stream.seek(info.start)
        stream.write(np.float32(np.nan).tobytes())
    with pytest.raises(WeightsError, match=r"`.*model` gives values that are not finite at 55 of 55 positions"):
        compare(layerwise(folder), layerwise(folder), WINDOWS, lambda done, total: None)
    with pytest.raises(WeightsError, match=r"activations of `model\.layers\.1\.self_attn\.qkv_a_proj` are not finite"):
        record_inputs(layerwise(folder), WINDOWS, lambda done, total: None)


def test_inputs_of_experts_are_those_of_their_tokens(folders: dict[str, Path]) -> None:
    arrays = record_inputs(layerwise(folders["float"]), WINDOWS, lambda done, total: None).arrays
    model, config = whole(folders["float"]), load_config(folders["float"])
    layer = model.layers[1]
    assert isinstance(layer.mlp, MoE)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    route = layer.mlp.gate.__call__

    class Gate:
        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            ids, scores = route(x)
            seen.append((np.array(x)[0], np.array(ids)[0]))
            return ids, scores

        weigh = layer.mlp.gate.weigh
        weighted_swiglu = layer.mlp.gate.weighted_swiglu

    object.__setattr__(layer.mlp, "gate", Gate())
    layer.mlp.pop("gate", None)
    for window in WINDOWS:
        mx.eval(model(mx.array([window])))
    x, ids = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for expert in range(config.n_routed_experts):
        rows = x[(ids == expert).any(axis=1)]
        assert arrays[f"{name}.tokens"][expert] == len(rows)
        expected = (rows**2).mean(axis=0) if len(rows) else np.zeros(config.hidden_size)
        np.testing.assert_allclose(arrays[f"{name}.mean_square"][expert], expected, rtol=1e-3, atol=1e-6)
    assert arrays[f"{name}.tokens"].sum() == sum(map(len, WINDOWS)) * config.num_experts_per_tok
    np.testing.assert_array_equal(arrays["model.layers.1.mlp.experts.down_proj.tokens"], arrays[f"{name}.tokens"])


def test_fused_and_separate_shared_experts_have_the_same_inputs(folders: dict[str, Path]) -> None:
    first, second = (
        record_inputs(layerwise(folders[name]), WINDOWS, lambda done, total: None).arrays for name in ("float", "mixed")
    )
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].shape == second[name].shape
    for name in ("mlp.shared_experts.gate_up_proj", "mlp.shared_experts.down_proj", "self_attn.o_proj"):
        values = np.stack([arrays[f"model.layers.1.{name}.mean_square"] for arrays in (first, second)])
        assert np.corrcoef(values)[0, 1] > 0.97
        assert first[f"model.layers.1.{name}.tokens"] == [57]


@pytest.mark.slow
def test_measured_importance_fits_every_layout_of_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    model = layerwise(folders["float"])
    arrays = record_inputs(model, WINDOWS, lambda done, total: None).arrays
    write_importance(tmp_path / "i", arrays, {"model": "m", "weights": norm_digest(model.reader)})
    options = ConvertOptions(preset="3bit", scales="search")
    conversion = open_conversion(folders["float"], options, Importance(tmp_path / "i"))
    result = convert(conversion, tmp_path / "out")
    plain = convert(open_conversion(folders["float"], options), tmp_path / "plain")
    assert 0 < result.relative_errors["routed experts"] != plain.relative_errors["routed experts"]


@pytest.mark.parametrize(
    ("texts", "window", "limit", "windows", "left_out"),
    [
        ([5], 2, 100, [2, 2], 0),  # a single token has no next one
        ([5, 3], 4, 100, [4, 3], 0),
        ([10], 4, 6, [4, 2], 4),
        ([10], 4, 5, [4], 6),
        ([4, 4], 4, 4, [4], 4),
    ],
)
def test_windows(texts: list[int], window: int, limit: int, windows: list[int], left_out: int) -> None:
    found = divide([list(range(length)) for length in texts], window, limit, 64)
    assert [len(part) for part in found.windows] == windows
    assert (found.num_tokens, found.num_left_out) == (sum(windows), left_out)


def test_windows_that_cannot_be_used() -> None:
    with pytest.raises(UsageError, match=r"a window of 65 tokens is longer than the model's context of 64"):
        divide([[1, 2, 3]], 65, 100, 64)
    with pytest.raises(UsageError, match=r"the texts have 1 tokens; at least 2"):
        divide([[1]], 4, 100, 64)
