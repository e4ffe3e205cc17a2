"""Presets and importance in conversions: which bits each matrix gets, sizes of known models, files of other models."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.planner.model_shape import known_config
from kimi_mlx.weights.conversion import open_conversion
from kimi_mlx.weights.convert_folder import RECORD_NAME, check_folder
from kimi_mlx.weights.convert_options import ConvertOptions
from kimi_mlx.weights.convert_plan import plan_conversion
from kimi_mlx.weights.convert_report import list_importance_notes, list_notes
from kimi_mlx.weights.importance import MIN_TOKENS, Importance, entry_of, norm_digest, write_importance
from kimi_mlx.weights.presets import PRESETS, TABLE_HEADER, preset_rows
from kimi_mlx.weights.reference_table import PublishedFormat, reference_checkpoint
from tests.checkpoints import load_golden, write_checkpoint
from tests.parity.test_logits import relative_error
from tests.unit.weights.conversions import contents, logits_of, logits_of_mlx_lm, run, tensors_of

TWO_BITS = ConvertOptions(preset="2bit", scales="search")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with three MoE layers, whose columns divide into all groups."""
    config = {**load_golden("k2").config, "num_hidden_layers": 4, "hidden_size": 128, "moe_intermediate_size": 128}
    config |= {"n_routed_experts": 8, "intermediate_size": 128}
    return write_checkpoint(tmp_path_factory.mktemp("deep") / "source", config, 1, "bfloat16")


def importance_of(source: Path, path: Path, options: ConvertOptions = TWO_BITS, seed: int = 0) -> Path:
    """Write an importance file of random values for a checkpoint."""
    rng, arrays = np.random.default_rng(seed), dict[str, np.ndarray]()
    conversion = open_conversion(source, options)
    for weight in conversion.plan.weights:
        if (entry := entry_of(weight)) is not None:
            leading = weight.shape[:1] if len(weight.shape) == 3 else ()
            arrays[f"{entry}.mean_square"] = rng.random((*leading, weight.shape[-1]), np.float32) ** 4
            arrays[f"{entry}.tokens"] = np.full(leading or (1,), 100)
    write_importance(path, arrays, {"model": source.name, "weights": norm_digest(conversion.reader)})
    return path


@pytest.mark.slow
def test_a_preset_sets_the_bits_of_each_matrix(deep: Path, tmp_path: Path) -> None:
    result = run(deep, tmp_path / "out", TWO_BITS)
    config = load_config(tmp_path / "out")
    bits = {
        (layer, name): config.quantization_of(f"model.layers.{layer}.mlp.switch_mlp.{name}_proj")
        for layer in (1, 2, 3)
        for name in ("gate", "up", "down")
    }
    for name in ("gate", "up"):
        assert [bits[layer, name] for layer in (1, 2, 3)] == [Quantization(n, 128) for n in (3, 2, 3)]
    assert [bits[layer, "down"] for layer in (1, 2, 3)] == [Quantization(n, 128) for n in (4, 3, 4)]
    for name in ("self_attn.o_proj", "mlp.shared_experts.up_proj"):
        assert config.quantization_of(f"model.layers.2.{name}") == Quantization(6, 64)
    tensors = tensors_of(tmp_path / "out")
    assert tensors["model.layers.1.mlp.gate.weight"].dtype == mx.float32
    assert relative_error(mx.array(logits_of(tmp_path / "out")), logits_of_mlx_lm(tmp_path / "out")) < 2e-5
    assert {"routed experts", "attention"} <= result.relative_errors.keys()
    assert result.relative_errors["routed experts"] > result.relative_errors["attention"] > 0


def test_groups_shrink_to_divide_the_columns(sources: dict[str, Path]) -> None:
    plan = open_conversion(sources["bf16"], TWO_BITS).plan
    for weight in plan.weights:
        if weight.can_be_quantized and weight.shape[-1] % 32 == 0:
            assert weight.plan.quantization is not None
            assert weight.shape[-1] % weight.plan.quantization.group_size == 0


SLOW_LAYOUTS = ("bf16", "int4", "affine, mixed", "affine, whole kv_b")


@pytest.mark.parametrize(
    "name", ["fp8", "int4-k2.5", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_LAYOUTS)]
)
def test_every_layout_converts_to_a_preset(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources[name], tmp_path / "out", TWO_BITS)
    logits = logits_of(tmp_path / "out")
    assert np.isfinite(logits).all()
    if "kv_b" not in name:  # mlx-lm quantizes a whole kv_b_proj again
        assert relative_error(mx.array(logits), logits_of_mlx_lm(tmp_path / "out")) < 2e-5


def test_matrices_with_no_more_bits_are_copied(sources: dict[str, Path], tmp_path: Path) -> None:
    conversion = open_conversion(sources["int4-k2.5"], ConvertOptions(preset="4bit", scales="search"))
    experts = [weight for weight in conversion.plan.weights if weight.kind == "routed experts"]
    assert all(weight.is_copied for weight in experts)
    assert "re-quantized" not in " ".join(list_notes(conversion.plan))
    notes = " ".join(list_notes(open_conversion(sources["int4-k2.5"], TWO_BITS).plan))
    assert "routed experts (4 to 3 bits)" in notes


@pytest.mark.parametrize(
    "options",
    [
        ConvertOptions(bits=4, preset="2bit"),
        ConvertOptions(expert_bits=2, preset="2bit"),
        ConvertOptions(group_size=64, preset="2bit"),
    ],
)
def test_a_preset_excludes_options_of_bits(options: ConvertOptions, sources: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="--preset 2bit and --"):
        open_conversion(sources["bf16"], options)


def test_the_record_of_old_options_is_unchanged(sources: dict[str, Path]) -> None:
    assert ConvertOptions(bits=4).record() == {"bits": 4, "expert_bits": None, "group_size": None}
    assert TWO_BITS.record()["preset"] == "2bit"


SIZES: dict[tuple[str, PublishedFormat], dict[str, float]] = {
    ("kimi-k2", "fp8"): {"2bit": 341.9, "2.5bit": 376.5, "3bit": 471.7, "4bit": 598.5},
    ("kimi-k2.5", "int4"): {"2bit": 343.9, "2.5bit": 378.2, "3bit": 505.0, "4bit": 648.1},
}
"""Gigabytes of known models, as in docs/quantization.md."""

CASES = [(*model, preset) for model in SIZES for preset in PRESETS]


@pytest.mark.parametrize(
    ("alias", "form", "preset"),
    [pytest.param(*case, marks=pytest.mark.sweep if number else pytest.mark.slow) for number, case in enumerate(CASES)],
)
def test_sizes_of_known_models_need_no_files(alias: str, form: PublishedFormat, preset: str) -> None:
    config = known_config(alias)
    checkpoint = reference_checkpoint(config, form, alias)
    checkpoint.check_names()
    plan = plan_conversion(checkpoint, ConvertOptions(preset=preset), config.vision is not None)
    assert round(plan.size_bytes / 1e9, 1) == SIZES[alias, form][preset]


@pytest.mark.slow
def test_importance_changes_the_result_and_is_part_of_the_record(deep: Path, tmp_path: Path) -> None:
    files = [Importance(importance_of(deep, tmp_path / f"{seed}.safetensors", seed=seed)) for seed in (1,)]
    conversions = [open_conversion(deep, TWO_BITS, importance) for importance in (None, *files)]
    from kimi_mlx.weights.convert import convert

    results = []
    for number, conversion in enumerate(conversions):
        convert(conversion, tmp_path / str(number))
        results.append(contents(tmp_path / str(number))["model-00003-of-00005.safetensors"])
    assert len(set(results)) == 2
    assert len({json.dumps(conversion.record()) for conversion in conversions}) == 2


def test_rare_experts_have_the_mean_of_their_layer(deep: Path, tmp_path: Path) -> None:
    path = importance_of(deep, tmp_path / "i.safetensors")
    first = Importance(path)
    arrays = {name: first.values(name) for name in first._table}
    entry = "model.layers.2.mlp.experts.gate_up_proj"
    tokens = arrays[f"{entry}.tokens"].copy()
    tokens[:3] = 0, MIN_TOKENS - 1, MIN_TOKENS
    write_importance(path, {**arrays, f"{entry}.tokens": tokens}, first.metadata)
    importance = Importance(path)
    weight = next(
        w for w in open_conversion(deep, TWO_BITS).plan.weights if w.path.endswith("2.mlp.switch_mlp.up_proj")
    )
    values, squares = importance.of(weight), arrays[f"{entry}.mean_square"]
    assert values is not None
    mean = (squares * tokens[:, None]).sum(axis=0) / tokens.sum()
    np.testing.assert_allclose(values[:2], [mean, mean], rtol=1e-5)
    np.testing.assert_array_equal(values[2:], squares[2:])
    (note,) = list_importance_notes(importance)
    assert note.startswith(f"importance: 2 of {3 * len(tokens)} experts saw fewer than 32 tokens (1 of them none)")


def test_importance_of_another_model_is_refused(deep: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    own = Importance(importance_of(deep, tmp_path / "own.safetensors"))
    with pytest.raises(WeightsError, match=r"has 27 inputs and the model 20: the file has `model\.layers\.3"):
        open_conversion(sources["bf16"], TWO_BITS, own)
    config = json.loads((deep / "config.json").read_text())
    tuned = write_checkpoint(tmp_path / "tuned", config, 2, "bfloat16")
    with pytest.raises(WeightsError, match=r"was made from `source` \(norms \w{12}\), but `.*tuned` has other weights"):
        open_conversion(tuned, TWO_BITS, own)
    wide = write_checkpoint(tmp_path / "wide", {**config, "moe_intermediate_size": 256}, 1, "bfloat16")
    with pytest.raises(WeightsError, match=r"has shape \(8, 128\), but the model has \(8, 256\)"):
        open_conversion(wide, TWO_BITS, own)


def test_the_digest_is_that_of_the_norms_in_any_format(deep: Path, tmp_path: Path) -> None:
    run(deep, tmp_path / "out", ConvertOptions(preset="2bit"))
    digests = {norm_digest(open_conversion(folder, ConvertOptions()).reader) for folder in (deep, tmp_path / "out")}
    assert len(digests) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
def test_values_that_are_no_importance_are_refused(value: float, deep: Path, tmp_path: Path) -> None:
    path = importance_of(deep, tmp_path / "i.safetensors")
    first = Importance(path)
    arrays = {name: first.values(name).copy() for name in first._table}
    arrays["lm_head.mean_square"][3] = value
    write_importance(path, arrays, first.metadata)
    with pytest.raises(WeightsError, match=r"`lm_head` in .* has values that are negative or not finite"):
        Importance(path).of(open_conversion(deep, TWO_BITS).plan.files[-1].weights[-1])


def test_other_files_are_no_importance(deep: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(WeightsError, match="is not a safetensors file"):
        Importance(tmp_path / "text")
    with pytest.raises(WeightsError, match="cannot be read"):
        Importance(tmp_path / "missing")
    with pytest.raises(WeightsError, match="has the format `pt`, not `kimi-mlx importance 1`"):
        Importance(next(deep.glob("*.safetensors")))


def test_a_run_with_other_importance_is_not_resumed(deep: Path, tmp_path: Path) -> None:
    path = importance_of(deep, tmp_path / "i.safetensors")
    weighed = open_conversion(deep, TWO_BITS, Importance(path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORD_NAME).write_text(json.dumps(weighed.record()))
    check_folder(weighed, tmp_path / "out")
    with pytest.raises(
        UsageError, match=r"contains an unfinished conversion of .* preset 2bit, scales search, importance"
    ):
        check_folder(open_conversion(deep, TWO_BITS), tmp_path / "out")


def test_weights_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    config = load_golden("k2").config
    source = write_checkpoint(tmp_path / "source", config, 1)
    info = open_conversion(source, TWO_BITS).reader.checkpoint.tensors["model.layers.0.self_attn.o_proj.weight"]
    with info.file.open("r+b") as stream:
        stream.seek(info.start)
        stream.write(np.float32(np.inf).tobytes())
    with pytest.raises(WeightsError, match=r"`model\.layers\.0\.self_attn\.o_proj` has values that are not finite"):
        run(source, tmp_path / "out", TWO_BITS)


def test_the_page_has_the_table_of_presets() -> None:
    page = (Path(__file__).parents[3] / "docs" / "quantization.md").read_text()
    assert f"\n| {' | '.join(TABLE_HEADER)} | Kimi K2 | Kimi K2.5 |" in page
    for row in preset_rows():
        sizes = [f"{SIZES[model][row[0]]} GB" for model in SIZES]
        assert f"\n| {' | '.join([*row, *sizes])} |" in page
