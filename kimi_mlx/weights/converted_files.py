"""The files of a conversion as data. Each weight has a plan of its stored form and one of its written form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kimi_mlx.weights.file_layout import FileLayout, lay_out
from kimi_mlx.weights.header import DTYPE_BYTES
from kimi_mlx.weights.plan import ArrayPlan, WeightPlan


@dataclass(frozen=True)
class ConvertedWeight:
    """A matrix or vector of the output.

    Args:
        path: name without suffix, which is the name of mlx-lm's module.
        suffix: `.weight`, or the suffix of the router's bias.
        kind: kind of matrix in reports, a key of kimi_mlx.weights.convert_plan.KINDS or its VISION_KIND.
        shape: unquantized shape.
        stored_plans: plans of the stored form: one; several if experts are stored in different formats.
        plan: plan of the written form: that of the stored form if it is copied unchanged; else its arrays have no
            copies, because they are quantized again (kimi_mlx.weights.requantize).
        can_be_quantized: whether the weight can be quantized: false for vectors and the router.
        is_transposed: whether the members of the stored form are transposed, as the keys of `kv_b_proj` are.
        is_indivisible: whether it stays float because its columns do not divide into groups.
    """

    path: str
    suffix: str
    kind: str
    shape: tuple[int, ...]
    stored_plans: tuple[WeightPlan, ...]
    plan: WeightPlan
    can_be_quantized: bool
    is_transposed: bool = False
    is_indivisible: bool = False

    @property
    def is_copied(self) -> bool:
        """Whether the stored form is copied unchanged."""
        return bool(self.plan.arrays[0].copies)

    @property
    def arrays(self) -> Iterator[tuple[str, ArrayPlan]]:
        """The arrays that are written, with their full names."""
        for array in self.plan.arrays:
            yield self.path + (f".{array.name}" if self.suffix == ".weight" else self.suffix), array


@dataclass(frozen=True)
class ConvertedFile:
    """A file of the output: one layer, or the top."""

    name: str
    weights: tuple[ConvertedWeight, ...]

    def layout(self) -> FileLayout:
        """Return the layout of the file: large types first, so that each tensor is aligned, then by name."""
        arrays = [item for weight in self.weights for item in weight.arrays]
        return lay_out(sorted(arrays, key=lambda item: (-DTYPE_BYTES[item[1].dtype], item[0])))


@dataclass(frozen=True)
class ConversionPlan:
    """All files of the output.

    Args:
        files: layers in order, then the top, then the vision tower if there is one.
        dtype: type of floats, as safetensors names it.
        has_vision: whether the last file is that of a vision tower.
        lacks_vision: whether the source has, or should have, a vision tower that is left out.
    """

    files: tuple[ConvertedFile, ...]
    dtype: str
    has_vision: bool
    lacks_vision: bool

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.layout().size_bytes for file in self.files)

    @property
    def weights(self) -> list[ConvertedWeight]:
        """All weights, in the order of the files."""
        return [weight for file in self.files for weight in file.weights]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(weight.plan.size_bytes for weight in self.weights)

    @property
    def bits_per_weight(self) -> float:
        """Average bits per weight, scales and biases included."""
        return 8 * self.tensor_bytes / sum(math.prod(weight.shape) for weight in self.weights)

    def index(self) -> dict[str, Any]:
        """Return the contents of `model.safetensors.index.json`."""
        weight_map = {name: file.name for file in self.files for weight in file.weights for name, _ in weight.arrays}
        return {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
