"""The `config.json` of a converted checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.weights.convert_options import DTYPE_NAMES
from kimi_mlx.weights.converted_files import ConversionPlan, ConvertedWeight

REMOVED_KEYS = ("quantization", "quantization_config", "compression_config", "auto_map")


def converted_config(raw: Mapping[str, Any], plan: ConversionPlan) -> dict[str, Any]:
    """Return the `config.json` of the output: that of the source with MLX's `quantization`.

    It does not have the formats of the source, `auto_map` (code files are not copied) or `vision_config` without a
    vision tower, and it has no multi-token prediction layers.
    """
    text = raw.get("text_config")
    config = _cleaned(raw, plan)
    if isinstance(text, Mapping):
        config["text_config"] = _cleaned(text, plan)
    elif "torch_dtype" not in config:
        config["torch_dtype"] = DTYPE_NAMES[plan.dtype]
    block = _quantization_block(plan)
    if block is not None:
        config |= {"quantization": block, "quantization_config": block}
    return config


def _cleaned(raw: Mapping[str, Any], plan: ConversionPlan) -> dict[str, Any]:
    removed = REMOVED_KEYS if plan.has_vision else (*REMOVED_KEYS, "vision_config")
    config = {name: value for name, value in raw.items() if name not in removed}
    for name in ("torch_dtype", "dtype"):
        if config.get(name) is not None:
            config[name] = DTYPE_NAMES[plan.dtype]
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0
    return config


def _quantization_block(plan: ConversionPlan) -> dict[str, Any] | None:
    """Return the block `quantization`: the most frequent format, and each path that differs; None if all are floats.

    Float matrices of the vision tower are not named: readers know them by their missing scales.
    """
    matrices = [weight for weight in plan.weights if weight.can_be_quantized]
    counts = Counter(weight.plan.quantization for weight in matrices if weight.plan.quantization is not None)
    if not counts:
        return None
    default = counts.most_common(1)[0][0]
    block: dict[str, Any] = {"group_size": default.group_size, "bits": default.bits, "mode": default.mode}
    for weight in matrices:
        if weight.plan.quantization != default:
            block |= dict.fromkeys(_module_paths(weight), _override(weight.plan.quantization))
    return block


def _override(quantization: Quantization | None) -> dict[str, Any] | bool:
    """Return the entry of one path in `quantization`. An entry without a mode is affine."""
    if quantization is None:
        return False
    value: dict[str, Any] = {"group_size": quantization.group_size, "bits": quantization.bits}
    return value if quantization.mode == "affine" else {**value, "mode": quantization.mode}


def _module_paths(weight: ConvertedWeight) -> list[str]:
    """Return the names under which readers look up the quantization: mlx-lm splits a whole `kv_b_proj` itself."""
    prefix, separator, _ = weight.path.partition("kv_b_proj")
    return [weight.path, f"{prefix}embed_q", f"{prefix}unembed_out"] if separator else [weight.path]
