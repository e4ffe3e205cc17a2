"""The stored form of a matrix follows from its tensors, and each form gives the values that are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.parallel.placement import place
from kimi_mlx.store.build import build_stores
from kimi_mlx.store.build_job import BuildJob
from kimi_mlx.store.folder_source import FolderSource
from kimi_mlx.store.manifest import read_manifest
from kimi_mlx.store.stores import load_store
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.conversion import open_conversion
from kimi_mlx.weights.convert import convert
from kimi_mlx.weights.convert_options import ConvertOptions
from kimi_mlx.weights.layer_plan import split_granularity_of
from kimi_mlx.weights.reader import open_checkpoint
from tests.checkpoints import FORMATS, load_golden, quantize_checkpoint, write_checkpoint
from tests.parity.test_logits import relative_error

Tensors = dict[str, mx.array]
GOLDEN = load_golden("k2")
IDS = mx.array(GOLDEN.input_ids[:, :20])
ROUTER, NORM, BIAS = (
    "model.layers.1.mlp.gate",
    "model.layers.1.input_layernorm",
    "model.layers.1.mlp.gate.e_score_correction_bias",
)
MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def load(folder: Path, dtype: mx.Dtype = mx.float32) -> Model:
    return load_model(folder, load_config(folder), dtype)


def tensors_of(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        mx.eval(list(loaded.values()))
        tensors |= loaded
    return tensors


def copy_with(source: Path, folder: Path, tensors: Tensors, change_config: Callable[[dict[str, Any]], object]) -> Path:
    """Write a checkpoint with the configuration of another one, and these tensors in one file."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    change_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


@pytest.fixture(scope="module")
def affine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("affine")
    source = write_checkpoint(folder / "float", GOLDEN.config, GOLDEN.seed)
    return quantize_checkpoint(source, folder / "quantized", bits=4, group_size=32)


def quantized(path: str, value: mx.array, bits: int) -> Tensors:
    """Return the tensors of a matrix or vector in MLX's affine quantization."""
    parts = mx.quantize(value.reshape(-1, value.shape[-1]), group_size=32, bits=bits)
    kinds = ("weight", "scales", "biases")
    return {f"{path}.{kind}": part.reshape(*value.shape[:-1], -1) for kind, part in zip(kinds, parts, strict=True)}


@pytest.mark.parametrize("path", [ROUTER, NORM])
@pytest.mark.parametrize("bits", [3, 8])
def test_a_quantized_router_or_norm_is_dequantized(path: str, bits: int, affine: Path, tmp_path: Path) -> None:
    tensors = tensors_of(affine)
    parts = quantized(path, tensors.pop(f"{path}.weight"), bits)
    override = {path: {"bits": bits, "group_size": 32}}
    folder = copy_with(affine, tmp_path / "quantized", tensors | parts, lambda c: c["quantization"].update(override))
    weight, scales, biases = (part.reshape(-1, part.shape[-1]) for part in parts.values())
    value = mx.dequantize(weight, scales, biases, 32, bits).reshape(*parts[f"{path}.weight"].shape[:-1], -1)
    plain = copy_with(affine, tmp_path / "plain", tensors | {f"{path}.weight": value}, lambda config: None)
    expected = dict(tree_flatten(load(plain).parameters()))
    found = dict(tree_flatten(load(folder).parameters()))
    assert expected.keys() == found.keys()
    assert all(mx.array_equal(expected[name], array) for name, array in found.items())
    convert(open_conversion(folder, ConvertOptions()), tmp_path / "converted")
    assert mx.array_equal(tensors_of(tmp_path / "converted")[f"{path}.weight"], value)


def split_files(folder: Path) -> None:
    """Spread the tensors over three files, so that those of a matrix are apart; there is no index."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    for number in range(3):
        part = dict(sorted(tensors.items())[number::3])
        mx.save_safetensors(str(folder / f"model-0000{number + 1}-of-00003.safetensors"), part)


def build_and_load(folder: Path, stores: Path, strategy: str) -> list[Model]:
    """Build the stores of two ranks, and load both."""
    config, source = load_config(folder), FolderSource(folder)
    checkpoint = Checkpoint(config, source.contents.table, str(folder))
    placement = place(config, strategy, 2, split_granularity_of(checkpoint, strategy))
    job = BuildJob(source, checkpoint, placement, stores)
    manifests = build_stores(job, [0, 1], SingleGroup())
    return [load_store(job.folder, read_manifest(job.folder / f"rank-{m.rank}"), config, mx.float32) for m in manifests]


def check_stores(folder: Path, stores: Path, strategy: str) -> None:
    """Check that stores hold the parameters that each rank loads from the checkpoint."""
    config = load_config(folder)
    checkpoint = open_checkpoint(folder, config).checkpoint
    placement = place(config, strategy, 2, split_granularity_of(checkpoint, strategy))
    for share, model in zip(placement.shares, build_and_load(folder, stores, strategy), strict=True):
        expected = dict(tree_flatten(load_model(folder, config, mx.float32, share).parameters()))
        found = dict(tree_flatten(model.parameters()))
        assert expected.keys() == found.keys()
        assert all(mx.array_equal(expected[name], array) for name, array in found.items())


@pytest.mark.parametrize("strategy", ["hybrid", "pipeline"])
def test_stores_hold_a_dequantized_router(strategy: str, affine: Path, tmp_path: Path) -> None:
    tensors = tensors_of(affine)
    parts = quantized(ROUTER, tensors.pop(f"{ROUTER}.weight"), 8)
    override = {ROUTER: {"bits": 8, "group_size": 32}}
    folder = copy_with(affine, tmp_path / "router", tensors | parts, lambda c: c["quantization"].update(override))
    split_files(folder)
    check_stores(folder, tmp_path / "stores", strategy)


def test_a_quantized_router_in_a_published_format_is_dequantized(tmp_path: Path) -> None:
    source = FORMATS / "int4"
    tensors = tensors_of(source)
    expert = "model.layers.1.mlp.experts.0.up_proj"
    value = mx.random.randint(0, 2**31, (8, 12)).astype(mx.int32)
    scale = mx.random.normal((8, 3)).astype(mx.bfloat16)
    del tensors[f"{ROUTER}.weight"]
    packed = {"packed": value, "scale": scale, "shape": tensors[f"{expert}.weight_shape"]}
    tensors |= {f"{ROUTER}.weight_{kind}": part for kind, part in packed.items()}
    folder = copy_with(source, tmp_path / "router", tensors, lambda config: None)
    scales = scale.astype(mx.float32)
    expected = mx.dequantize(value.view(mx.uint32), scales, -8 * scales, 32, 4)
    router = dict(tree_flatten(load(folder).parameters()))["layers.1.mlp.gate.weight"]
    assert mx.array_equal(router[:8].astype(mx.float32), expected)


def test_a_quantized_bias_is_refused_by_name(affine: Path, tmp_path: Path) -> None:
    tensors = tensors_of(affine)
    folder = copy_with(affine, tmp_path / "a", tensors | {f"{BIAS}.scales": mx.ones((1,))}, lambda config: None)
    with pytest.raises(WeightsError, match=rf"has the tensor `{BIAS}\.scales` in `model\.safetensors`"):
        load(folder)
    folder = copy_with(affine, tmp_path / "b", tensors | {BIAS: tensors[BIAS].astype(mx.uint32)}, lambda config: None)
    with pytest.raises(WeightsError, match=rf"tensor `{BIAS}` in .* has type U32, not a float type"):
        load(folder)


def test_a_vector_in_fp8_blocks_is_refused_by_name(tmp_path: Path) -> None:
    tensors = tensors_of(FORMATS / "fp8")
    value = tensors[f"{NORM}.weight"]
    fp8 = {f"{NORM}.weight": mx.to_fp8(value), f"{NORM}.weight_scale_inv": mx.ones((1,))}
    folder = copy_with(FORMATS / "fp8", tmp_path / "fp8", tensors | fp8, lambda config: None)
    with pytest.raises(WeightsError, match=rf"`{NORM}\.weight`"):
        load(folder)


@pytest.mark.parametrize("name", ["fp8", "int4", "bf16"])
def test_a_quantization_block_beside_published_weights_changes_nothing(name: str, tmp_path: Path) -> None:
    block = {"bits": 4, "group_size": 64, "mode": "affine"}
    source, tensors = FORMATS / name, tensors_of(FORMATS / name)
    folder = copy_with(source, tmp_path / name, tensors, lambda config: config.update(quantization=block))
    expected = dict(tree_flatten(load(source).parameters()))
    found = dict(tree_flatten(load(folder).parameters()))
    assert expected.keys() == found.keys()
    assert all(mx.array_equal(expected[path], array) for path, array in found.items())


def in_mode(tensors: Tensors, mode: str) -> tuple[Tensors, Tensors]:
    """Return a checkpoint in one of MLX's modes without biases, and its values."""
    bits, group_size = MODES[mode]
    stored: Tensors = {}
    values: Tensors = {}
    for name, value in tensors.items():
        path = name.removesuffix(".weight")
        stored[name] = values[name] = value
        if value.ndim > 1 and not path.endswith("mlp.gate"):
            weight, scales, *_ = mx.quantize(value, group_size=group_size, bits=bits, mode=mode)
            stored |= {name: weight, f"{path}.scales": scales}
            values[name] = mx.dequantize(weight, scales, None, group_size, bits, mode, dtype=mx.float32)
    return stored, values


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=pytest.mark.slow) for mode in ("mxfp4", "mxfp8", "nvfp4")])
def test_modes_of_mlx_give_the_logits_of_their_values(mode: str, affine: Path, tmp_path: Path) -> None:
    source = affine.parent / "float"
    bits, group_size = MODES[mode]
    block = {"bits": bits, "group_size": group_size, "mode": mode}
    c, random = GOLDEN.config, np.random.default_rng(0)
    heads, latent = c["num_attention_heads"], c["kv_lora_rank"]
    halves = {"embed_q": (heads, latent, c["qk_nope_head_dim"]), "unembed_out": (heads, c["v_head_dim"], latent)}
    tensors = {name: value for name, value in tensors_of(source).items() if "kv_b_proj" not in name}
    for layer in range(c["num_hidden_layers"]):
        for half, shape in halves.items():
            value = random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
            tensors[f"model.layers.{layer}.self_attn.{half}.weight"] = mx.array(value)
    stored, values = in_mode(tensors, mode)
    folder = copy_with(source, tmp_path / mode, stored, lambda c: c.update(quantization=block))
    plain = copy_with(source, tmp_path / "plain", values, lambda config: None)
    expected = np.asarray(load(plain)(IDS))
    assert relative_error(load(folder)(IDS), expected) < 1e-4
    assert load(folder, mx.float16).embed_tokens(IDS).dtype == mx.float16
    check_stores(folder, tmp_path / "stores", "hybrid")
    convert(open_conversion(folder, ConvertOptions()), tmp_path / "copied")
    assert json.loads((tmp_path / "copied" / "config.json").read_text())["quantization"]["mode"] == mode
    assert relative_error(load(tmp_path / "copied")(IDS), expected) < 1e-4
    convert(open_conversion(folder, ConvertOptions(bits=8, group_size=32)), tmp_path / "affine")
    assert relative_error(load(tmp_path / "affine")(IDS), expected) < 0.3  # 8 bits may choose another expert


def test_a_mode_without_biases_refuses_biases_by_name(affine: Path, tmp_path: Path) -> None:
    block = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    folder = copy_with(affine, tmp_path / "a", tensors_of(affine), lambda config: config.update(quantization=block))
    with pytest.raises(WeightsError, match=r"has biases, but .* mode `mxfp4`"):
        load(folder)
