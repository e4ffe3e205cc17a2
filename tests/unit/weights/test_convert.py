"""Conversion to MLX's quantized layout: the result in mlx-lm and here, what is copied unchanged, and memory."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.errors import UsageError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.weights import requantize
from kimi_mlx.weights.conversion import open_conversion
from kimi_mlx.weights.convert import convert
from kimi_mlx.weights.convert_options import BFLOAT16_BITS, ConvertOptions
from kimi_mlx.weights.convert_report import list_notes
from kimi_mlx.weights.fp8 import decode
from kimi_mlx.weights.index import INDEX_NAME, read_index
from tests.checkpoints import load_golden, quantize_checkpoint, write_checkpoint
from tests.parity.test_logits import relative_error
from tests.unit.weights.conversions import GROUPS_OF_32, contents, logits_of, logits_of_mlx_lm, run, tensors_of

QUICK = [
    ("bf16", GROUPS_OF_32),
    ("fp8", ConvertOptions()),
    ("int4", ConvertOptions()),
    ("int4-k2.5", ConvertOptions()),
    ("int4-k2.5", ConvertOptions(bits=3)),
    ("int4", ConvertOptions(expert_bits=4)),
    ("fp8", ConvertOptions(bits=BFLOAT16_BITS, expert_bits=2, group_size=32)),
    ("affine, mixed", ConvertOptions()),
]
WIDE = [
    (source, ConvertOptions(bits, expert_bits, group_size))
    for source in ("bf16", "fp8", "int4", "int4-k2.5", "affine", "affine, mixed", "affine, whole kv_b", "float32")
    for bits, expert_bits in [(2, None), (5, 3), (6, 8), (BFLOAT16_BITS, None), (None, 6), (8, BFLOAT16_BITS)]
    for group_size in (None, 32, 64)
    if not (bits == BFLOAT16_BITS and group_size)
]


@pytest.mark.parametrize(
    ("name", "options"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.sweep) for case in WIDE)]
)
def test_logits_of_the_result_equal_mlx_lm(
    name: str, options: ConvertOptions, sources: dict[str, Path], tmp_path: Path
) -> None:
    run(sources[name], tmp_path / "out", options)
    assert relative_error(mx.array(logits_of(tmp_path / "out")), logits_of_mlx_lm(tmp_path / "out")) < 2e-5


LOSSLESS = ["int4", "int4-k2.5", "affine", "affine, one by one", "affine, mixed", "affine, whole kv_b"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if at % 2 else ()) for at, name in enumerate(LOSSLESS)]
)
def test_quantized_matrices_are_copied_without_loss(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources[name], tmp_path / "out")
    assert relative_error(mx.array(logits_of(tmp_path / "out")), logits_of(sources[name])) < 1e-5


@pytest.mark.parametrize("options", [ConvertOptions(), GROUPS_OF_32, ConvertOptions(expert_bits=4, group_size=32)])
def test_packed_integers_are_copied_bit_for_bit(
    options: ConvertOptions, sources: dict[str, Path], tmp_path: Path
) -> None:
    run(sources["int4-k2.5"], tmp_path / "out", options)
    before, after = tensors_of(sources["int4-k2.5"]), tensors_of(tmp_path / "out")
    prefix = "language_model.model.layers.1.mlp."
    for name in ("gate_proj", "up_proj", "down_proj"):
        experts = [f"{prefix}experts.{number}.{name}" for number in range(8)]
        packed = mx.stack([before[f"{path}.weight_packed"].view(mx.uint32) for path in experts])
        scales = mx.stack([before[f"{path}.weight_scale"] for path in experts])
        stack = f"{prefix}switch_mlp.{name}"
        assert mx.array_equal(after[f"{stack}.weight"], packed)
        assert mx.array_equal(after[f"{stack}.scales"], scales)
        assert after[f"{stack}.scales"].dtype == mx.bfloat16
        assert mx.array_equal(after[f"{stack}.biases"], -8 * scales)


def test_copying_mlx_affine_changes_no_tensor(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["affine, mixed"], tmp_path / "out")
    before, after = tensors_of(sources["affine, mixed"]), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_floats_are_quantized_as_mlx_lm_does(bits: int, tmp_path: Path) -> None:
    golden = load_golden("k2")
    source = write_checkpoint(tmp_path / "source", golden.config, golden.seed, "bfloat16")
    peer = quantize_checkpoint(source, tmp_path / "peer", bits, 32, dtype="bfloat16")
    run(source, tmp_path / "out", ConvertOptions(bits=bits, group_size=32))
    expected, found = tensors_of(peer), tensors_of(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not mx.array_equal(expected[name], found[name])] == []


@pytest.mark.slow
def test_the_chunk_size_does_not_change_the_result(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fp8", "affine"):
        run(sources[name], tmp_path / name / "whole", ConvertOptions(bits=3, group_size=32))
    monkeypatch.setattr(requantize, "CHUNK_VALUES", 5000)
    for name in ("fp8", "affine"):
        run(sources[name], tmp_path / name / "chunks", ConvertOptions(bits=3, group_size=32))
        assert contents(tmp_path / name / "whole") == contents(tmp_path / name / "chunks")


def test_fp8_is_converted_to_its_values(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["fp8"], tmp_path / "out", ConvertOptions(bits=BFLOAT16_BITS))
    before, after = tensors_of(sources["fp8"]), tensors_of(tmp_path / "out")
    for path in ("model.layers.1.self_attn.kv_a_proj_with_mqa", "model.layers.1.mlp.shared_experts.down_proj"):
        scales = np.array(before[f"{path}.weight_scale_inv"])
        values = decode(np.array(before[f"{path}.weight"]), scales, (128, 128))
        assert mx.array_equal(after[f"{path}.weight"], mx.array(values).astype(mx.bfloat16))
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_router_and_norms_stay_float(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["bf16"], tmp_path / "out", GROUPS_OF_32)
    tensors = tensors_of(tmp_path / "out")
    types = {
        "mlp.gate.weight": mx.bfloat16,
        "mlp.gate.e_score_correction_bias": mx.float32,
        "input_layernorm.weight": mx.bfloat16,
        "mlp.switch_mlp.up_proj.weight": mx.uint32,
        "mlp.switch_mlp.up_proj.scales": mx.bfloat16,
    }
    assert {name: tensors[f"model.layers.1.{name}"].dtype for name in types} == types


def test_floats_have_the_type_of_the_configuration(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["float32"], tmp_path / "out", GROUPS_OF_32)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {mx.float32, mx.uint32}
    run(sources["float32"], tmp_path / "half", ConvertOptions(bits=BFLOAT16_BITS, expert_bits=4))
    tensors = tensors_of(tmp_path / "half")
    assert tensors["model.norm.weight"].dtype == tensors["lm_head.weight"].dtype == mx.bfloat16
    assert load_config(tmp_path / "half").dtype == "bfloat16"


def test_kv_b_proj_is_copied_whole_or_split_and_requantized(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["affine, whole kv_b"]
    run(source, tmp_path / "kept")
    run(source, tmp_path / "split", ConvertOptions(bits=8))
    kept, split = tensors_of(tmp_path / "kept"), tensors_of(tmp_path / "split")
    path = "model.layers.1.self_attn."
    assert mx.array_equal(kept[f"{path}kv_b_proj.weight"], tensors_of(source)[f"{path}kv_b_proj.weight"])
    assert f"{path}embed_q.weight" not in kept
    assert {f"{path}embed_q.scales", f"{path}unembed_out.scales"} <= split.keys()
    assert f"{path}kv_b_proj.weight" not in split
    assert relative_error(mx.array(logits_of(tmp_path / "split")), logits_of(source)) < 0.1


def test_mlx_lm_finds_the_bits_of_a_whole_kv_b_proj(tmp_path: Path) -> None:
    golden = load_golden("k2")
    source = write_checkpoint(tmp_path / "source", golden.config, golden.seed)
    path = "model.layers.1.self_attn."
    own: dict[str, dict[str, int] | bool] = {f"{path}kv_b_proj": {"bits": 8, "group_size": 32}}
    affine = quantize_checkpoint(source, tmp_path / "affine", 4, 32, overrides=own, split_kv_b=False)
    run(affine, tmp_path / "out")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    names = [f"{path}{name}" for name in ("kv_b_proj", "embed_q", "unembed_out")]
    assert [block[name] for name in names] == [{"bits": 8, "group_size": 32}] * 3
    assert relative_error(mx.array(logits_of_mlx_lm(tmp_path / "out")), logits_of(affine)) < 0.2


def test_the_configuration_describes_the_result(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["int4-k2.5"], tmp_path / "out", ConvertOptions(expert_bits=4))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["quantization"] == raw["quantization_config"]
    assert "quantization_config" not in raw["text_config"]
    assert raw["model_type"] == "kimi_k25"
    prefixes = {path.split(".")[0] for path in raw["quantization"]} - {"group_size", "bits", "mode"}
    assert prefixes == {"language_model"}  # no tower: it stays float
    config = load_config(tmp_path / "out")
    assert config.compression is None
    assert config.quantization_of("model.layers.1.mlp.switch_mlp.up_proj") == Quantization(4, 32)
    assert config.quantization_of("model.layers.1.self_attn.o_proj") == Quantization(8, 32)
    assert config.vision == load_config(sources["int4-k2.5"]).vision


def test_outdated_keys_of_the_configuration_are_removed(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["int4-k2.5"], tmp_path / "source")
    raw = json.loads((source / "config.json").read_text())
    raw |= {"auto_map": {"AutoConfig": "code.Config"}, "vision_config": {}, "torch_dtype": "float16"}
    raw["text_config"]["num_nextn_predict_layers"] = 1
    (source / "config.json").write_text(json.dumps(raw))
    run(source, tmp_path / "out")
    new = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "vision_config"} & new.keys()
    assert new["text_config"]["num_nextn_predict_layers"] == 0
    assert new["torch_dtype"] == new["text_config"]["torch_dtype"] == "bfloat16"


def test_columns_that_do_not_divide_stay_float(sources: dict[str, Path], tmp_path: Path) -> None:
    conversion = open_conversion(sources["bf16"], ConvertOptions(bits=4, group_size=64))
    indivisible = [weight for weight in conversion.plan.weights if weight.is_indivisible]
    assert indivisible
    assert all(weight.shape[-1] % 64 and weight.plan.quantization is None for weight in indivisible)
    assert any(f"{len(indivisible)} matrices stay bfloat16" in note for note in list_notes(conversion.plan))
    convert(conversion, tmp_path / "out")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert sorted(path for path, value in block.items() if value is False) == sorted(
        weight.path for weight in indivisible
    )


def test_notes_name_requantized_matrices(sources: dict[str, Path]) -> None:
    def notes(options: ConvertOptions) -> str:
        return " ".join(list_notes(open_conversion(sources["int4"], options).plan))

    assert "routed experts" in notes(ConvertOptions(expert_bits=3))
    assert "re-quantized" not in notes(ConvertOptions(expert_bits=4))


@pytest.mark.parametrize(
    ("name", "options", "group_size"),
    [
        ("int4", ConvertOptions(bits=4), 32),
        ("int4", ConvertOptions(bits=4, group_size=64), 64),
        ("bf16", ConvertOptions(), 64),
        ("bf16", ConvertOptions(group_size=32), 32),
        ("fp8", ConvertOptions(expert_bits=2), 64),
    ],
)
def test_the_default_group_is_that_of_the_experts(
    name: str, options: ConvertOptions, group_size: int, sources: dict[str, Path]
) -> None:
    quantizations = {weight.plan.quantization for weight in open_conversion(sources[name], options).plan.weights}
    assert {quantization.group_size for quantization in quantizations if quantization} == {group_size}


@pytest.mark.parametrize("options", [ConvertOptions(group_size=64), ConvertOptions(bits=BFLOAT16_BITS, group_size=64)])
def test_options_without_effect_are_refused(options: ConvertOptions, sources: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="--group-size 64"):
        open_conversion(sources["int4"], options)


def test_index_and_sizes_are_those_of_the_files(sources: dict[str, Path], tmp_path: Path) -> None:
    conversion = open_conversion(sources["fp8"], GROUPS_OF_32)
    result = convert(conversion, tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    tensors = tensors_of(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert [file.name for file in files] == [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    assert result.size_bytes == sum(file.stat().st_size for file in files)
    assert result.files == 3
    table = read_index(tmp_path / "out")
    assert all(info.start % 8 == 0 or info.dtype not in ("U32", "F32") for info in table.values())


def test_small_files_are_copied_except_code(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["fp8"], tmp_path / "source")
    kept = {"tokenizer_config.json", "tiktoken.model", "chat_template.jinja", "generation_config.json", "LICENSE"}
    for name in {*kept, "tokenization_kimi.py", "tokenizer.py", "README.md", ".hidden.json"}:
        (source / name).write_text(name)
    run(source, tmp_path / "out")
    names = contents(tmp_path / "out").keys()
    assert {name for name in names if not name.startswith("model")} == {*kept, "config.json"}
    assert (tmp_path / "out" / "LICENSE").read_text() == "LICENSE"


@pytest.mark.parametrize(
    "options",
    [ConvertOptions(), pytest.param(ConvertOptions(bits=4), marks=pytest.mark.slow)],
    ids=["kept", "quantized"],
)
def test_memory_is_limited_to_a_few_chunks(
    options: ConvertOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_golden("k2")
    wide = {"num_hidden_layers": 2, "n_routed_experts": 96, "moe_intermediate_size": 192, "vocab_size": 8192}
    source = write_checkpoint(tmp_path / "source", {**golden.config, **wide}, 1, "bfloat16")
    if options.bits is None:
        source = quantize_checkpoint(source, tmp_path / "affine", 4, 32, stack_experts=False, dtype="bfloat16")
    chunk = 192 * golden.config["hidden_size"]
    monkeypatch.setattr(requantize, "CHUNK_VALUES", chunk)
    conversion = open_conversion(source, options)
    layer = conversion.plan.files[1].layout().size_bytes
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    try:
        convert(conversion, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1] + mx.get_peak_memory() - before
    finally:
        tracemalloc.stop()
    assert peak < 20 * chunk * 4 + 500_000
    assert peak < layer
