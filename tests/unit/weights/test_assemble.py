"""Loading: what is missing, foreign or broken is named."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from kimi_mlx.errors import ConfigError, WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.weights.assemble import load_model
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
    """Put all tensors into one file, with some changed (None: left out)."""
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


def test_extra_layers_rotary_buffers_and_vision_are_left_out(folder: Path) -> None:
    layers = GOLDEN.config["num_hidden_layers"]
    extra = {
        f"model.layers.{layers}.embed_tokens.weight": mx.zeros((4, 4)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros((4,)),
        "vision_tower.encoder.blocks.0.wqkv.weight": mx.zeros((4, 4)),
    }
    rewrite(folder, dict(extra))
    load(folder)
    assert set(extra) <= set(read_index(folder))


def test_a_file_cut_short_is_named(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=rf"{file.name}` is cut short"):
        load(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0not json at all!", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_a_file_that_is_no_safetensors_is_named(folder: Path, content: bytes) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=file.name):
        load(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(WeightsError, match=rf"1 of 2 files .* missing, first `{file.name}`"):
        load(folder)


def test_an_empty_folder_and_a_broken_config(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(folder)


def test_scales_without_a_quantization_block(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if not name.startswith("quantization")}
    (folder / "config.json").write_text(json.dumps(kept))
    with pytest.raises(WeightsError, match="no `quantization`"):
        load(folder)


def test_an_override_of_the_stack_counts_for_experts_one_by_one(tmp_path: Path) -> None:
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
