"""Quantization settings in `config.json`: MLX's modes, and the FP8 and INT4 formats of published weights."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kimi_mlx.errors import ConfigError
from kimi_mlx.model.config_values import ValueRange, check_fields, check_value, get_object

MODES: Mapping[str, tuple[int, int] | None] = {"affine": None, "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""MLX's modes, with the only bits and group size of those that have no choice."""


@dataclass(frozen=True)
class Quantization:
    """MLX's quantization of a weight: `bits` per value, and per group one scale, in affine mode also one bias.

    Source: https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
    """

    bits: int
    group_size: int
    mode: str = "affine"

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of MLX's functions for quantized matrices."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True)
class Fp8Blocks:
    """Published FP8 matrices (K2): 8-bit floats, e4m3, with one `weight_scale_inv` per block."""

    block_rows: int
    block_columns: int


@dataclass(frozen=True)
class PackedInts:
    """Published INT4 or INT8 matrices (experts of K2-Thinking, K2.5): packed symmetric integers.

    `bits` per value, one `weight_scale` per group of columns.
    """

    bits: int
    group_size: int


def parse_quantization(
    outer: Mapping[str, Any], raw: Mapping[str, Any], where: str
) -> tuple[Quantization | None, dict[str, Quantization], Fp8Blocks | PackedInts | None]:
    """Return MLX's `quantization` with its overrides per path, and the format of published weights.

    A file may have both. The tensors of a matrix decide which of them applies, so that an unsupported format of
    published weights is an error only if it is the only one.
    """
    names = ("quantization", "quantization_config")  # mlx-lm writes a copy of the first as the second
    blocks = [(name, block) for name in names for level in (outer, raw) if (block := get_object(level, name, where))]
    published = next((block for _, block in blocks if "quant_method" in block), None)
    name, block = next((item for item in blocks if "quant_method" not in item[1]), ("", None))
    if block is None:
        return None, {}, None if published is None else _parse_compression(published, where)
    default = _one_quantization(block, where, name)
    overrides = {
        path.removeprefix("language_model."): _one_quantization(
            {**block, "mode": None, **value}, where, f"{name}.{path}"
        )
        for path, value in block.items()
        if isinstance(value, Mapping)  # `false` marks a matrix that is not quantized
    }
    try:
        compression = None if published is None else _parse_compression(published, where)
    except ConfigError:
        compression = None
    return default, overrides, compression


def _parse_compression(block: Mapping[str, Any], where: str) -> Fp8Blocks | PackedInts:
    """Parse the `quantization_config` of published weights: Moonshot's FP8 or INT4."""
    method = block["quant_method"]
    if method == "fp8":
        return _parse_fp8(block, where)
    if method == "compressed-tensors":
        return _parse_packed(block, where)
    algorithm = f" ({reprlib.repr(block['quant_algo'])})" if block.get("quant_algo") else ""
    raise ConfigError(
        f"`{where}`: quantization method {reprlib.repr(method)}{algorithm} is not supported; supported are 'fp8', "
        "'compressed-tensors' and MLX's quantization",
        hint=_FORMAT_HINT,
    )


_FORMAT_HINT = "use a checkpoint as Moonshot publishes it or one of mlx-community: `kimi-mlx models` lists them"

PACKED: Mapping[str, tuple[Any, ...]] = {"format": ("pack-quantized",), "transform_config": (None, {})}
PACKED_GROUP: Mapping[str, tuple[Any, ...]] = {
    "format": ("pack-quantized", None),
    "input_activations": (None,),
    "output_activations": (None,),
}
PACKED_WEIGHTS: Mapping[str, tuple[Any, ...]] = {
    "num_bits": (4, 8),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group",),
    "group_size": (32, 64, 128),
    "actorder": (None, False),
}
"""Supported values in compressed-tensors' `quantization_config`, in its one group, and in the group's weights. With
these the weights convert to MLX's affine layout without rounding."""


def _parse_fp8(block: Mapping[str, Any], where: str) -> Fp8Blocks:
    """Parse `{fmt, weight_block_size}`. Settings for activations are ignored, because activations stay floats."""
    name = "quantization_config."
    _require(block, {"fmt": ("e4m3", None)}, where, name)
    size = block.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2:
        raise ConfigError(
            f"`{where}` has {name}weight_block_size = {reprlib.repr(size)}, not two whole numbers: "
            "fp8 is only supported with one scale per block",
            hint=_FORMAT_HINT,
        )
    rows, columns = (check_value(value, "int", ValueRange(), where, f"{name}weight_block_size") for value in size)
    return Fp8Blocks(rows, columns)


def _parse_packed(block: Mapping[str, Any], where: str) -> PackedInts:
    """Parse compressed-tensors' block: one group of weights, packed symmetric integers, and nothing else."""
    name = "quantization_config."
    _require(block, PACKED, where, name)
    groups = get_object(block, "config_groups", where, name)
    if len(groups) != 1:
        raise ConfigError(f"`{where}` has {len(groups)} {name}config_groups; only one is supported", hint=_FORMAT_HINT)
    (key,) = groups
    group = get_object(groups, key, where, f"{name}config_groups.")
    name += f"config_groups.{key}."
    _require(group, PACKED_GROUP, where, name)
    weights = get_object(group, "weights", where, name)
    _require(weights, PACKED_WEIGHTS, where, f"{name}weights.")
    return PackedInts(int(weights["num_bits"]), int(weights["group_size"]))


def _require(block: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], where: str, prefix: str) -> None:
    """Reject a block with unsupported values; None among the allowed values means that the field may be absent."""
    for name, values in allowed.items():
        if block.get(name) not in values:
            supported = " or ".join(repr(value) for value in values if value) or "none"
            raise ConfigError(
                f"`{where}` has {prefix}{name} = {reprlib.repr(block.get(name))}; only {supported} is supported",
                hint=_FORMAT_HINT,
            )


def _one_quantization(block: Mapping[str, Any], where: str, name: str) -> Quantization:
    """Parse one `{bits, group_size, mode}`; without a mode it is affine."""
    mode = block.get("mode") or "affine"
    if not isinstance(mode, str) or mode not in MODES:
        raise ConfigError(
            f"`{where}` has {name}.mode = {reprlib.repr(mode)}; supported are {', '.join(MODES)}", hint=_FORMAT_HINT
        )
    fixed = MODES[mode]
    if fixed is None:
        return Quantization(**check_fields(Quantization, {**block, "mode": mode}, where, f"{name}."))
    actual = block.get("bits", fixed[0]), block.get("group_size", fixed[1])
    if actual != fixed:
        raise ConfigError(
            f"`{where}` has {name} with {actual[0]} bits in groups of {actual[1]}; {mode} has {fixed[0]} in groups of "
            f"{fixed[1]}",
            hint=_FORMAT_HINT,
        )
    return Quantization(*fixed, mode)
