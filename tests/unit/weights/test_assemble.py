"""Loading: errors name the tensor or file, and only one copy of an array is in memory."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from kimi_mlx.errors import ConfigError, WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.weights import assemble
from kimi_mlx.weights.assemble import load_model, make_weight
from kimi_mlx.weights.index import INDEX_NAME, read_index
from tests.checkpoints import load_golden, quantize_checkpoint, write_checkpoint

GOLDEN = load_golden("k2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = write_checkpoint(tmp_path / "float", GOLDEN.config, GOLDEN.seed)
    return quantize_checkpoint(source, tmp_path / "quantized", bits=4, group_size=32)


def load(folder: Path) -> None:
    load_model(folder, load_config(folder), mx.float32)


def rewrite(folder: Path, change: dict[str, mx.array | None]) -> None:
    """Put all tensors into one file; change some of them, or leave them out (None)."""
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        tensors |= loaded
        mx.eval(list(loaded.values()))
        file.unlink()
    tensors |= {name: value for name, value in change.items() if value is not None}
    kept = {name: value for name, value in tensors.items() if change.get(name, value) is not None}
    (folder / INDEX_NAME).unlink(missing_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), kept)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, {"model.layers.1.self_attn.o_proj.weight": None})
    with pytest.raises(WeightsError, match=r"lacks the tensor `model\.layers\.1\.self_attn\.o_proj\.weight`"):
        load(folder)


def test_a_missing_half_of_a_quantized_tensor_is_named(folder: Path) -> None:
    rewrite(folder, {"model.layers.1.mlp.switch_mlp.up_proj.biases": None})
    with pytest.raises(WeightsError, match=r"up_proj\.biases"):
        load(folder)


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    rewrite(folder, {"model.layers.1.self_attn.indexer.wq.weight": mx.zeros((4, 4))})
    with pytest.raises(WeightsError, match=r"has the tensor `model\.layers\.1\.self_attn\.indexer\.wq\.weight`"):
        load(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, {"model.norm.weight": mx.zeros((7,))})
    with pytest.raises(WeightsError, match=r"`model\.norm\.weight` .* shape \(7,\); .* requires \(\d+,\)"):
        load(folder)


def test_extra_layers_rotary_buffers_and_vision_are_ignored(folder: Path) -> None:
    layers = GOLDEN.config["num_hidden_layers"]
    extra = {
        f"model.layers.{layers}.embed_tokens.weight": mx.zeros((4, 4)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros((4,)),
        "vision_tower.encoder.blocks.0.wqkv.weight": mx.zeros((4, 4)),
    }
    rewrite(folder, dict(extra))
    load(folder)
    assert set(extra) <= set(read_index(folder))


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=rf"{file.name}` is truncated"):
        load(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0not json at all!", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_a_file_of_another_format_is_named(folder: Path, content: bytes) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=file.name):
        load(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(WeightsError, match=rf"1 of 2 files .* missing, first `{file.name}`"):
        load(folder)


def test_a_missing_or_broken_config_is_an_error(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(folder)


def test_scales_without_a_quantization_block_are_an_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if not name.startswith("quantization")}
    (folder / "config.json").write_text(json.dumps(kept))
    with pytest.raises(WeightsError, match="no `quantization`"):
        load(folder)


def test_an_override_of_the_stack_applies_to_separate_experts(tmp_path: Path) -> None:
    path = "model.layers.1.mlp.switch_mlp.up_proj"
    source = write_checkpoint(tmp_path / "float", GOLDEN.config, GOLDEN.seed)
    stacks = {
        is_stacked: quantize_checkpoint(
            source,
            tmp_path / str(is_stacked),
            bits=4,
            group_size=32,
            overrides={path: {"bits": 6, "group_size": 32}},
            stack_experts=is_stacked,
        )
        for is_stacked in (True, False)
    }
    parameters = [
        dict(tree_flatten(load_model(each, load_config(each), mx.float32).parameters())) for each in stacks.values()
    ]
    assert all(mx.array_equal(value, parameters[1][name]) for name, value in parameters[0].items())


@pytest.mark.parametrize("stack_experts", [True, False])
def test_one_copy_of_an_array_is_in_memory(stack_experts: bool, tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 64, "num_hidden_layers": 2}
    source = write_checkpoint(tmp_path / "float", {**GOLDEN.config, **wide}, GOLDEN.seed)
    folder = quantize_checkpoint(source, tmp_path / "affine", 4, 32, stack_experts=stack_experts)
    load(folder)  # what is loaded once only
    gc.collect()  # what earlier tests have left
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    model = load_model(folder, load_config(folder), mx.float32)
    numpy_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    extra = numpy_bytes + mx.get_peak_memory() - mx.get_active_memory()
    largest = max(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
    assert mx.get_active_memory() - before > 2 * largest
    assert largest > 1_000_000
    assert extra < largest


def test_an_array_is_read_before_it_is_cast(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[mx.Dtype] = []
    evaluate = mx.eval

    def record(array: mx.array) -> None:
        evaluated.append(array.dtype)
        evaluate(array)

    lazy = mx.load(str(sorted(folder.glob("*.safetensors"))[0]))
    assert isinstance(lazy, dict)
    monkeypatch.setattr(assemble.mx, "eval", record)
    weight = make_weight([lazy["model.layers.0.input_layernorm.weight"]], None, "input_layernorm", mx.bfloat16)
    assert evaluated == [mx.float32, mx.bfloat16]
    assert weight.weight.dtype == mx.bfloat16
