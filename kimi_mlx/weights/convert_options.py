"""Options of a conversion, and the formats that they mean for a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from kimi_mlx.errors import UsageError
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.names import SourceMatrix
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.presets import PRESETS, Preset

BFLOAT16_BITS = 16
"""Value of the options that means bfloat16 instead of a quantization."""
DEFAULT_BITS, DEFAULT_GROUP_SIZE = 4, 64
NON_EXPERT_BITS = 8
"""Bits of all other matrices if only --expert-bits is given."""

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
STORED_TYPES = {name: stored for stored, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class ConvertOptions:
    """Options of the user; None where an option was not given.

    Args:
        bits: bits of every matrix that can be quantized, or BFLOAT16_BITS.
        expert_bits: bits of routed experts, or BFLOAT16_BITS.
        group_size: group size of re-quantized matrices.
        no_vision: whether to leave out the vision tower.
        preset: name of a preset, which replaces the three options above.
        scales: `search` for scales of least error, or `min-max` for those of mlx-lm.
        importance: digest of the importance file; empty without one.
    """

    bits: int | None = None
    expert_bits: int | None = None
    group_size: int | None = None
    no_vision: bool = False
    preset: str | None = None
    scales: Literal["search", "min-max"] = "min-max"
    importance: str = ""

    def record(self) -> dict[str, Any]:
        """Return the options for the record of an unfinished conversion.

        Options that earlier versions did not have are left out where they are not used.
        """
        first = {"bits", "expert_bits", "group_size"}
        values, defaults = asdict(self), {field.name: field.default for field in fields(self)}
        return {name: value for name, value in values.items() if name in first or value != defaults[name]}


@dataclass(frozen=True)
class TargetFormats:
    """Formats of the output.

    Args:
        keeps_quantization: whether each matrix keeps its stored quantization; `experts` and `others` are then unused.
        experts: quantization of routed experts; None for floats.
        others: quantization of all other matrices; None for floats.
        dtype: type of floats and of new scales, as safetensors names it.
        preset: preset that gives the formats instead of `experts` and `others`.
    """

    keeps_quantization: bool
    experts: Quantization | None
    others: Quantization | None
    dtype: str
    preset: Preset | None = None


def target_formats(checkpoint: Checkpoint, options: ConvertOptions, sources: Sequence[SourceMatrix]) -> TargetFormats:
    """Return the formats that the options mean for the matrices of a checkpoint.

    Raises:
        UsageError: the options contradict each other or the checkpoint.
    """
    stored = {source: checkpoint.matrices.quantization(source.paths[0]) for source in sources if not source.is_float}
    dtype = STORED_TYPES.get(checkpoint.config.dtype, "BF16")
    bits, expert_bits = options.bits, options.expert_bits
    if options.preset is not None:
        return _preset_formats(options, dtype)
    if bits is None and expert_bits is None and any(stored.values()):
        if options.group_size is not None:
            raise UsageError(
                f"--group-size {options.group_size} alone has no effect: `{checkpoint.location}` is already quantized",
                hint="add --bits to quantize it again",
            )
        return TargetFormats(True, None, None, dtype)
    if bits is None:
        bits = DEFAULT_BITS if expert_bits is None else NON_EXPERT_BITS
    if expert_bits is None:
        expert_bits = bits
    if BFLOAT16_BITS in (bits, expert_bits):
        dtype = "BF16"
    if bits == expert_bits == BFLOAT16_BITS and options.group_size is not None:
        raise UsageError(
            f"--group-size {options.group_size} has no effect on bfloat16", hint="omit it, or choose other --bits"
        )
    has_small_groups = any(q is not None and q.group_size == 32 for source, q in stored.items() if _is_expert(source))
    group_size = options.group_size or (32 if has_small_groups else DEFAULT_GROUP_SIZE)
    return TargetFormats(False, _quantization(expert_bits, group_size), _quantization(bits, group_size), dtype)


def _preset_formats(options: ConvertOptions, dtype: str) -> TargetFormats:
    assert options.preset is not None
    others = {"--bits": options.bits, "--expert-bits": options.expert_bits, "--group-size": options.group_size}
    for name, value in others.items():
        if value is not None:
            raise UsageError(
                f"--preset {options.preset} and {name} {value} contradict each other",
                hint="omit one of them; `kimi-mlx convert --help` has the bits of each preset",
            )
    return TargetFormats(False, None, None, dtype, PRESETS[options.preset])


def _quantization(bits: int, group_size: int) -> Quantization | None:
    return None if bits == BFLOAT16_BITS else Quantization(bits, group_size)


def _is_expert(source: SourceMatrix) -> bool:
    return ".mlp.experts." in source.paths[0] or ".switch_mlp." in source.paths[0]
