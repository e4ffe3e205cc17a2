"""config.json of each generation, and files that are rejected."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_mlx.errors import ConfigError
from kimi_mlx.model.config import ModelConfig, load_config, parse_config, read_json
from kimi_mlx.model.config_quantization import Fp8Blocks, PackedInts, Quantization
from tests.checkpoints import load_golden

K2 = {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "eos_token_id": 163585,
}

# `quantization_config` of K2, and of K2-Thinking and K2.5, as published
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": [
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        "re:.*lm_head.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
MLX = {"group_size": 64, "bits": 4, "mode": "affine"}


def changed(**values: Any) -> dict[str, Any]:
    return {**copy.deepcopy(K2), **values}


def test_k2() -> None:
    config = parse_config(K2)
    assert config.attention_scale == pytest.approx(192**-0.5 * (0.1 * math.log(32) + 1) ** 2)
    assert not config.is_moe_layer(0)
    assert config.is_moe_layer(1)


def test_k25_is_found_in_text_config() -> None:
    inner = changed(rms_norm_eps=1e-5)
    config = parse_config({"model_type": "kimi_k25", "dtype": "bfloat16", "text_config": inner})
    assert (config.model_type, config.rms_norm_eps, config.dtype) == ("kimi_k2", 1e-5, "bfloat16")


def test_rope_parameters_of_transformers_5() -> None:
    old = parse_config(K2)
    raw = changed(rope_parameters={**K2["rope_scaling"], "rope_type": "yarn", "rope_theta": 50000.0})  # type: ignore[dict-item]
    for name in ("rope_scaling", "rope_theta"):
        del raw[name]
    new = parse_config(raw)
    assert (new.rope_theta, new.yarn) == (old.rope_theta, old.yarn)


def test_quantization_with_overrides() -> None:
    block = {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "lm_head": {"bits": 8, "group_size": 32},
        "language_model.model.embed_tokens": {"bits": 6},
        "model.norm": False,
    }
    config = parse_config(changed(quantization=block, quantization_config=block))
    assert config.quantization_of("model.layers.0.mlp.down_proj") == Quantization(4, 64)
    assert config.quantization_of("lm_head") == Quantization(8, 32)
    assert config.quantization_of("model.embed_tokens") == Quantization(6, 64)


def test_published_formats() -> None:
    fp8 = parse_config(changed(quantization_config=FP8))
    assert (fp8.compression, fp8.quantization) == (Fp8Blocks(128, 128), None)
    int4 = parse_config(changed(quantization_config=INT4))
    assert (int4.compression, int4.quantization) == (PackedInts(4, 32), None)
    nested = parse_config({"model_type": "kimi_k25", "text_config": changed(quantization_config=INT4)})
    assert nested.compression == PackedInts(4, 32)


def test_a_block_size_need_not_be_square() -> None:
    config = parse_config(changed(quantization_config={**FP8, "weight_block_size": [64, 256]}))
    assert config.compression == Fp8Blocks(block_rows=64, block_columns=256)


@pytest.mark.parametrize(
    ("values", "compression"),
    [
        ({"quantization": MLX}, None),
        ({"quantization_config": MLX}, None),  # without `quant_method` it is mlx-lm's copy
        ({"quantization": MLX, "quantization_config": MLX}, None),
        ({"quantization": MLX, "quantization_config": INT4}, PackedInts(4, 32)),
        ({"quantization": MLX, "text_config": changed(quantization_config=INT4)}, PackedInts(4, 32)),
        ({"quantization_config": MLX, "text_config": changed(quantization_config=INT4)}, PackedInts(4, 32)),
        ({"text_config": changed(quantization_config=FP8, quantization=MLX)}, Fp8Blocks(128, 128)),
        ({"quantization": MLX, "quantization_config": {"quant_method": "modelopt"}}, None),
        ({"quantization": MLX, "quantization_config": {**INT4, "format": "nvfp4-pack-quantized"}}, None),
    ],
)
def test_mlx_quantization_and_the_published_format_side_by_side(
    values: dict[str, Any], compression: Fp8Blocks | PackedInts | None
) -> None:
    config = parse_config(changed(**values))
    assert (config.quantization, config.compression) == (Quantization(4, 64), compression)


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_modes_of_mlx_have_fixed_groups(mode: str, bits: int, group_size: int) -> None:
    block = {"mode": mode, "bits": bits, "group_size": group_size, "lm_head": {"bits": 8, "group_size": 64}}
    config = parse_config(changed(quantization=block))
    assert config.quantization_of("model.embed_tokens") == Quantization(bits, group_size, mode)
    assert config.quantization_of("lm_head") == Quantization(8, 64, "affine")
    with pytest.raises(ConfigError, match=f"{mode} has {bits} in groups of {group_size}"):
        parse_config(changed(quantization={**block, "group_size": 64}))


@pytest.mark.parametrize(
    "block",
    [
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {}},
        {"quant_method": "mxfp4"},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {**INT4, "format": "nvfp4-pack-quantized"},
        {**INT4, "format": "mxfp4-pack-quantized"},
    ],
)
def test_formats_of_other_tools_are_refused_with_an_alternative(block: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=block.get("quant_algo") or block.get("format") or block["quant_method"]) as e:
        parse_config(changed(quantization_config=block))
    assert "mlx-community" in (e.value.hint or "")


INT4_PATHS = {
    "format": ["int-quantized", "nvfp4-pack-quantized", None],
    "transform_config": [{"config_groups": {}}],
    "config_groups": [{}, {"group_0": {}, "group_1": {}}],
    "config_groups.group_0.input_activations": [{"num_bits": 8}],
    "config_groups.group_0.format": ["float-quantized"],
    "config_groups.group_0.weights": [None],
    "config_groups.group_0.weights.num_bits": [3, 16, True, "4", None],
    "config_groups.group_0.weights.type": ["float", None],
    "config_groups.group_0.weights.symmetric": [False, None],
    "config_groups.group_0.weights.strategy": ["channel", "tensor_group"],
    "config_groups.group_0.weights.group_size": [16, 33, -1, None],
    "config_groups.group_0.weights.actorder": ["weight", "group"],
}


def with_value(block: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of a block with one nested value replaced."""
    first, _, rest = path.partition(".")
    return {**block, first: with_value(block[first], rest, value) if rest else value}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in INT4_PATHS.items() for value in values])
def test_unsupported_packing_is_rejected_with_its_path(path: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"quantization_config\.{re.escape(path)}.*; only .* is supported") as caught:
        parse_config(changed(quantization_config=with_value(INT4, path, value)))
    assert caught.value.hint is not None
    assert "kimi-mlx models" in caught.value.hint


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fmt": "e5m2"}, r"fmt = 'e5m2'; only 'e4m3' is supported"),
        ({"weight_block_size": None}, "weight_block_size = None, not two whole numbers"),
        ({"weight_block_size": [128]}, r"weight_block_size = \[128\], not two whole numbers"),
        ({"weight_block_size": [128, 0]}, "weight_block_size = 0, not a whole number"),
        ({"weight_block_size": "128x128"}, "weight_block_size = '128x128', not two"),
    ],
)
def test_unsupported_fp8_is_rejected_with_its_field(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(changed(quantization_config={**FP8, **values}))


@pytest.mark.parametrize("method", ["mxfp4", "awq", "gptq", "bitsandbytes", None, ["fp8"]])
def test_other_quantization_methods_are_rejected_by_name(method: Any) -> None:
    with pytest.raises(ConfigError, match=rf"quantization method {re.escape(repr(method))} is not supported"):
        parse_config(changed(quantization_config={"quant_method": method, "bits": 4}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "kimi_k3"}, "Kimi K3"),
        ({"model_type": "llama"}, "llama"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "llama3"),
        ({"rope_scaling": {"type": "yarn", "factor": 8}}, "original_max_position_embeddings"),
        ({"kv_lora_rank": None}, "`kv_lora_rank`"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "7168"}, "hidden_size"),
        ({"num_experts_per_tok": 500}, "384"),
        ({"n_group": 5}, "n_group"),
        ({"qk_rope_head_dim": 63}, "63"),
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "int4"}}, "int4"),
        ({"quantization": {"bits": 4}}, "group_size"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(changed(**values), "config.json")


INF, NAN = math.inf, math.nan
WRONG = {
    "rope_theta": ["x", [], INF, NAN, 0, 1, -5, True],
    "rope_scaling": ["x", 5, [], False],
    "rope_parameters": ["x"],
    "quantization": ["x", 4, [], True],
    "quantization_config": ["x", [1]],
    "text_config": ["x", 1],
    "n_group": [0, "12", -1, 1.5, INF],
    "topk_group": ["x", 0, NAN],
    "moe_layer_freq": [0, -1],
    "q_lora_rank": [0, "1536"],
    "num_hidden_layers": [3_000_000, 1001, 0, 4.5, NAN, INF, 1e300, {}],
    "n_routed_experts": [100_001, "384"],
    "num_experts_per_tok": [True, 2.5, 0],
    "n_shared_experts": [-1, "1"],
    "first_k_dense_replace": ["1", -1],
    "hidden_size": [2**40 + 1, 10**400],
    "routed_scaling_factor": ["2", NAN, INF, 10**400],
    "rms_norm_eps": [NAN, INF, 0, -1e-6, "1e-6"],
    "max_position_embeddings": [NAN, "131072"],
    "norm_topk_prob": ["false", 1, []],
    "dtype": [5, ["bfloat16"]],
}
WRONG_INNER = {
    "rope_scaling": {
        "factor": ["x", [], INF, NAN, 0, -1],
        "original_max_position_embeddings": ["x", [], INF, NAN, 0, 4096.5],
        "beta_fast": ["x", {}, INF, NAN, 0],
        "beta_slow": ["x", [], INF, NAN, -1],
        "mscale": ["x", [], INF, NAN, -1],
        "mscale_all_dim": ["x", [], INF, NAN, -1],
    },
    "quantization": {"bits": [INF, 0, 7, 16, "4", True, NAN], "group_size": [INF, 0, 16, 48, "64", 64.5]},
}
QUANTIZED = {"bits": 4, "group_size": 64}


def flat(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), flat(WRONG))
def test_invalid_value_is_rejected_with_file_field_and_value(name: str, value: Any) -> None:
    shown = re.escape(repr(value)[:10])
    with pytest.raises(ConfigError, match=rf"`some/config\.json` has {name} = {shown}.*, not "):
        parse_config(changed(**{name: value}), "some/config.json")


@pytest.mark.parametrize(
    ("block", "name", "value"), [(block, *item) for block, table in WRONG_INNER.items() for item in flat(table)]
)
def test_invalid_nested_value_is_rejected_with_its_path(block: str, name: str, value: Any) -> None:
    raw = changed(quantization=dict(QUANTIZED))
    raw[block][name] = value
    with pytest.raises(ConfigError, match=rf"`config\.json` has {block}\.{name} = {re.escape(repr(value))}, not "):
        parse_config(raw)


def test_invalid_override_is_rejected_with_its_path() -> None:
    with pytest.raises(ConfigError, match=r"quantization\.lm_head\.bits = 7, not a whole number among 2, 3"):
        parse_config(changed(quantization={**QUANTIZED, "lm_head": {"bits": 7}}))


def test_message_contains_the_allowed_values() -> None:
    with pytest.raises(ConfigError, match=r"`config\.json` has n_group = 0, not a whole number from 1"):
        parse_config(changed(n_group=0))
    with pytest.raises(ConfigError, match=r"rope_theta = 1, not a number above 1"):
        parse_config(changed(rope_theta=1))


def test_a_group_needs_two_experts() -> None:
    with pytest.raises(ConfigError, match="384 experts in n_group = 384, fewer than 2 per group"):
        parse_config(changed(n_group=384))


def test_whole_floats_are_whole_numbers() -> None:
    config = parse_config(changed(num_hidden_layers=4.0, num_experts_per_tok=2.0, routed_scaling_factor=2))
    values = (config.num_hidden_layers, config.num_experts_per_tok, config.routed_scaling_factor)
    assert [(value, type(value)) for value in values] == [(4, int), (2, int), (2.0, float)]


def test_null_is_absent() -> None:
    nothing = dict.fromkeys(("q_lora_rank", "n_shared_experts", "rope_scaling", "rope_theta", "quantization"))
    config = parse_config(changed(**nothing))
    assert (config.q_lora_rank, config.n_shared_experts, config.yarn, config.rope_theta) == (None, 0, None, 10000.0)


def test_published_configs_are_accepted() -> None:
    assert load_config(Path(__file__).parents[3] / "kimi_mlx/models/kimi-mini").quantization == Quantization(4, 32)
    for name in ("k2", "k2-thinking", "k2.5", "moonlight", "grouped", "grouped-negative"):
        assert isinstance(parse_config(load_golden(name).config), ModelConfig)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "[]", "{", "\ud800".encode("utf-8", "replace") + b"\xff"]
)
def test_file_without_a_json_object_is_named_in_the_error(tmp_path: Path, text: str | bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        read_json(file)


def test_permission_error_hints_at_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_config(tmp_path)
    assert caught.value.hint == "check its permissions"


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([1, 2, 64, "x"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
NAMES = (*K2, *WRONG, "topk_method", "scoring_func", "hidden_act", "tie_word_embeddings", "dtype")
PATHS = [(name,) for name in NAMES] + [(block, name) for block, table in WRONG_INNER.items() for name in table]
PATHS += [("quantization", "mode"), ("quantization", "lm_head"), ("rope_scaling", "type")]
COMPRESSION_PATHS = [(FP8, name) for name in FP8] + [(INT4, path) for path in INT4_PATHS]


VALID = parse_config(K2)


@settings(deadline=None)
@given(st.sampled_from(PATHS), VALUES)
def test_any_value_is_accepted_or_raises_config_error(path: tuple[str, ...], value: Any) -> None:
    raw = changed(quantization=dict(QUANTIZED))
    target = raw[path[0]] if len(path) == 2 else raw
    target[path[-1]] = value
    try:
        config = parse_config(json.loads(json.dumps(raw)))
    except ConfigError:
        return
    assert math.isfinite(config.attention_scale)
    assert all(type(getattr(config, name)) is type(getattr(VALID, name)) for name in ("n_group", "rope_theta", "dtype"))


@settings(deadline=None)
@given(st.sampled_from(COMPRESSION_PATHS), VALUES)
def test_any_value_in_a_published_format_is_accepted_or_raises_config_error(
    place: tuple[dict[str, Any], str], value: Any
) -> None:
    block = with_value(*place, value)
    try:
        config = parse_config(changed(quantization_config=json.loads(json.dumps(block))))
    except ConfigError:
        return
    assert isinstance(config.compression, (Fp8Blocks, PackedInts))


@pytest.mark.parametrize("block", [{"group_size": 0, "bits": 4}, {"bits": 4}, {"group_size": 64, "bits": 99}])
def test_an_invalid_quantization_has_a_hint(block: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="quantization") as caught:
        parse_config({**K2, "quantization": block})
    assert "another checkpoint" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(ConfigError, match=f"it is {kind}, not a file"):
        load_config(tmp_path)
