"""Presets of `kimi-mlx convert`: the bits of each kind of matrix. The help and docs/quantization.md have this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kimi_mlx.model.config_quantization import Quantization

ALL_BITS = (2, 3, 4, 5, 6, 8)
"""Numbers of bits of MLX's affine format."""

GROUP_SIZES = (128, 64, 32)
"""Its group sizes."""


@dataclass(frozen=True)
class Preset:
    """Formats of the matrices of a model.

    Routed experts have `experts`, with the next higher number of bits in all down projections, and one step more in all
    projections of the first and the last layer with experts, where errors count most.

    Args:
        name: name for the user.
        experts: quantization of the gate and up projections of routed experts.
        rest: quantization of all other matrices: attention, shared experts, dense layers, embedding and head.
    """

    name: str
    experts: Quantization
    rest: Quantization

    def expert_format(self, is_down: bool, is_end: bool) -> Quantization:
        """Return the quantization of routed experts.

        Args:
            is_down: whether it is for the down projections.
            is_end: whether it is for the first or the last layer with experts.
        """
        return replace(self.experts, bits=ALL_BITS[ALL_BITS.index(self.experts.bits) + is_down + is_end])


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("2bit", Quantization(2, 128), Quantization(6, 64)),
        Preset("2.5bit", Quantization(2, 64), Quantization(8, 64)),
        Preset("3bit", Quantization(3, 128), Quantization(8, 64)),
        Preset("4bit", Quantization(4, 128), Quantization(8, 64)),
    )
}

TABLE_HEADER = ("preset", "gate, up", "down", "first, last layer", "rest", "groups")
"""Columns of the table of presets; `first, last layer` has the bits of gate and up, and of down, there."""


def preset_rows() -> list[tuple[str, ...]]:
    """Return the rows of the table of presets."""
    rows: list[tuple[str, ...]] = []
    for preset in PRESETS.values():
        bits = {(down, end): preset.expert_format(down, end).bits for down in (False, True) for end in (False, True)}
        groups = f"{preset.experts.group_size}, rest {preset.rest.group_size}"
        inner = (str(bits[False, False]), str(bits[True, False]))
        rows.append((preset.name, *inner, f"{bits[False, True]}, {bits[True, True]}", str(preset.rest.bits), groups))
    return rows


def fitting_format(quantization: Quantization, columns: int) -> Quantization | None:
    """Return the quantization with the largest group size up to its own that divides the columns; None if none does."""
    sizes = (size for size in GROUP_SIZES if size <= quantization.group_size and columns % size == 0)
    group_size = next(sizes, None)
    return None if group_size is None else replace(quantization, group_size=group_size)
