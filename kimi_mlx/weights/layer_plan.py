"""The plan of a layer: its arrays, and the slices of stored tensors that fill them.

A plan depends only on headers, configuration and a rank's share. Loading a checkpoint copies the slices into memory,
building a store copies them into files, and a conversion quantizes them again (requantize.py). This module reads no
tensor: numpy is used for shapes and views only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.names import SourceMatrix, TreeEntry, is_latent_first, layer_entries, num_fused_shared, top_entries
from kimi_mlx.parallel.placement import SHARDED_AXES, Range, RankShare, SplitGranularity, parse_strategy
from kimi_mlx.weights.checkpoint import Checkpoint, MatrixField, MatrixFormat
from kimi_mlx.weights.index import DTYPE_BYTES

Shape3 = tuple[int, int, int]
"""(members of a stack, rows, columns); a plain matrix is a stack of one, a norm has one row."""


@dataclass(frozen=True)
class TensorSlice:
    """A slice of a stored matrix. Ranges count elements of the unquantized matrix; None takes all.

    Args:
        source: matrix, whose heads and blocks define the stack.
        per: stored columns per `values` columns.
        values: see `per`.
        stack: members of a matrix that is stored as a stack or becomes one by heads.
        rows: rows of each member.
        columns: columns of each row.
    """

    source: SourceMatrix
    per: int
    values: int
    stack: Range | None = None
    rows: Range | None = None
    columns: Range | None = None

    def view(self, array: np.ndarray) -> np.ndarray:
        """Return the slice of a stored matrix (..., rows, columns), or of a norm, as a view."""
        return self._slice_axes(self._split_blocks(self._split_heads(array)))

    def shape3(self, stored_shape: tuple[int, ...]) -> Shape3:
        """Return the shape of the slice, as a stack."""
        return as_shape3(self.view(np.broadcast_to(np.uint8(0), stored_shape)).shape)

    def _split_heads(self, array: np.ndarray) -> np.ndarray:
        if self.source.heads is None:
            return array
        heads, first, end = self.source.heads
        return array.reshape(heads, -1, array.shape[-1])[:, first:end]

    def _split_blocks(self, array: np.ndarray) -> np.ndarray:
        """Turn concatenated shared experts into a stack: (S, rows, columns)."""
        source = self.source
        if not source.blocks:
            return array
        if source.sharded_axes[0].axis == "rows":
            return array.reshape(source.blocks, -1, array.shape[-1])
        return array.reshape(array.shape[0], source.blocks, -1).swapaxes(0, 1)

    def _slice_axes(self, array: np.ndarray) -> np.ndarray:
        if self.stack is not None:
            array = array[self.stack.start : self.stack.stop]
        if self.rows is not None:
            array = array[..., self.rows.start : self.rows.stop, :]
        if self.columns is not None:
            start, stop = (bound * self.per // self.values for bound in (self.columns.start, self.columns.stop))
            array = array[..., start:stop]
        return array


@dataclass(frozen=True)
class SliceCopy:
    """Copy of one slice into an array.

    Args:
        field: stored form of the slice's tensor.
        tensor_slice: the slice.
        shape: shape of the slice.
        member: first member in the destination.
        row: first row in the destination.
    """

    field: MatrixField
    tensor_slice: TensorSlice
    shape: Shape3
    member: int
    row: int


@dataclass(frozen=True)
class ArrayPlan:
    """An array of the canonical tree.

    Args:
        name: `weight`, `scales` or `biases`.
        dtype: type as safetensors names it.
        shape: (..., rows, columns), or (extent,).
        copies: copies that fill the array; together they cover it exactly once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    copies: tuple[SliceCopy, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class WeightPlan:
    """Arrays and quantization of one weight."""

    arrays: tuple[ArrayPlan, ...]
    quantization: Quantization | None


@dataclass(frozen=True)
class LayerPlan:
    """A rank's weights of a layer, or of the top.

    Args:
        entries: name -> parts of the weight; more than one if fused matrices have different quantizations.
        latent_first: see kimi_mlx.model.tree.LayerWeights.
        num_fused_shared: see there.
        first_expert: see there.
    """

    entries: dict[str, tuple[WeightPlan, ...]]
    latent_first: bool = False
    num_fused_shared: int = 0
    first_expert: int = 0

    def arrays(self) -> Iterator[tuple[str, ArrayPlan]]:
        """Yield all arrays with their names in a store."""
        for entry, parts in self.entries.items():
            for number, part in enumerate(parts):
                for array in part.arrays:
                    yield array_name(entry, number, len(parts), array.name), array

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.size_bytes for _, array in self.arrays())


def array_name(entry: str, part: int, parts: int, array: str) -> str:
    """Return the name of an array in a store, such as `self_attn.o_proj.scales`."""
    return f"{entry}.{array}" if parts == 1 else f"{entry}.{part}.{array}"


def plan_layer(checkpoint: Checkpoint, layer: int, share: RankShare | None) -> LayerPlan:
    """Plan a rank's share of a layer, which may be empty.

    Args:
        checkpoint: the checkpoint.
        layer: number of the layer.
        share: share of the rank; None for the whole layer.

    Raises:
        WeightsError: missing or wrongly stored tensors.
    """
    config, layout = checkpoint.config, checkpoint.layout
    if share is not None and layer not in range(share.layers.start, share.layers.stop):
        return LayerPlan({})
    fuses_shared = share is None or len(share.experts) == config.n_routed_experts
    return LayerPlan(
        _plan_entries(checkpoint, layer_entries(config, layer, layout, fuses_shared), share),
        latent_first=is_latent_first(layer, layout),
        num_fused_shared=num_fused_shared(config, layer, layout) if fuses_shared else 0,
        first_expert=0 if share is None else share.experts.start,
    )


def plan_top(checkpoint: Checkpoint, share: RankShare | None) -> LayerPlan:
    """Plan the embedding, the last norm and the head."""
    plan = LayerPlan(_plan_entries(checkpoint, top_entries(checkpoint.config), share))
    if "lm_head" not in plan.entries:
        plan.entries.pop("model.norm")
    return plan


def split_granularity_of(checkpoint: Checkpoint, strategy: str) -> SplitGranularity:
    """Return the smallest parts into which the matrices can be split without splitting quantization groups."""
    fuses_shared = "experts" not in SHARDED_AXES[parse_strategy(strategy)[0]]
    units: dict[str, int] = {}
    for layer in range(checkpoint.config.num_hidden_layers):
        for entry in layer_entries(checkpoint.config, layer, checkpoint.layout, fuses_shared):
            for source in (source for part in entry.parts for source in part):
                for axis in source.sharded_axes:
                    if axis.axis == "columns":
                        quantization = checkpoint.quantization(source.paths[0])
                        group = quantization.group_size if quantization is not None else 1
                        unit = group // math.gcd(group, axis.unit)
                        units[axis.share_field] = math.lcm(units.get(axis.share_field, 1), unit)
    return SplitGranularity(*map(units.get, ("heads", "expert_rows", "shared_rows", "dense_rows")))


def as_shape3(shape: tuple[int, ...]) -> Shape3:
    """Return a shape of one to three axes as (members, rows, columns)."""
    members, rows, columns = (1,) * (3 - len(shape)) + tuple(shape)
    return members, rows, columns


def _plan_entries(
    checkpoint: Checkpoint, entries: list[TreeEntry], share: RankShare | None
) -> dict[str, tuple[WeightPlan, ...]]:
    return {entry.name: _plan_entry(checkpoint, entry, share) for entry in entries if _holds(share, entry)}


def _holds(share: RankShare | None, entry: TreeEntry) -> bool:
    """Return whether a rank has a share of an entry."""
    axes = (axis for part in entry.parts for source in part for axis in source.sharded_axes)
    return share is None or all(len(share.range_of(axis.share_field)) for axis in axes)


def _plan_entry(checkpoint: Checkpoint, entry: TreeEntry, share: RankShare | None) -> tuple[WeightPlan, ...]:
    """Plan an entry; fuse its parts into one weight if their types and quantizations are equal."""
    parts = [_members(checkpoint, part, share) for part in entry.parts]
    for members in parts:
        if len({matrix.kind for _, matrix in members}) > 1:
            stored = " and ".join(sorted({"/".join(matrix.kind[0]) for _, matrix in members}))
            raise WeightsError(f"experts of one layer are stored in different types: {stored}")
    if len({members[0][1].kind for members in parts}) > 1:
        return tuple(_plan_weight(checkpoint, [members], share) for members in parts)
    return (_plan_weight(checkpoint, parts, share),)


Member = tuple[SourceMatrix, MatrixFormat]


def _members(checkpoint: Checkpoint, sources: Sequence[SourceMatrix], share: RankShare | None) -> list[Member]:
    """Return the matrices that are stacked into one part, with their stored formats."""
    return [
        (source, checkpoint.matrix(path, source.suffix, source.shape))
        for source in sources
        for path in _held_paths(source, share)
    ]


def _held_paths(source: SourceMatrix, share: RankShare | None) -> Sequence[str]:
    """Return the paths of a source's matrices in a rank's share: some of them if a stack is stored one by one."""
    span = _ranges(source, share).get("stack")
    return source.paths if span is None or len(source.paths) == 1 else source.paths[span.start : span.stop]


def _plan_weight(checkpoint: Checkpoint, parts: list[list[Member]], share: RankShare | None) -> WeightPlan:
    """Plan the fusion of parts: concatenate their rows; each part is a stack of its members."""
    matrix = parts[0][0][1]
    arrays = tuple(_plan_array(checkpoint, parts, number, share) for number in range(len(matrix.fields)))
    return WeightPlan(arrays, matrix.quantization)


def _plan_array(checkpoint: Checkpoint, parts: list[list[Member]], number: int, share: RankShare | None) -> ArrayPlan:
    """Plan one field of a weight: (members, sum of the parts' rows, columns), or without the first axis."""
    copies: list[SliceCopy] = []
    field = parts[0][0][1].fields[number]
    row = members = num_axes = columns = 0
    for part in parts:
        member = height = 0
        for source, matrices in groupby(part, key=lambda item: item[0]):  # matrices of a source have equal shapes
            fields = [matrix.fields[number] for _, matrix in matrices]
            tensor_slice = _tensor_slice(source, fields[0], share)
            shape = tensor_slice.shape3(checkpoint.tensors[fields[0].tensors[0]].shape)
            for member_field in fields:
                copies.append(SliceCopy(member_field, tensor_slice, shape, member, row))
                member += shape[0]
            _, height, columns = shape
            num_axes = max(num_axes, _num_axes(source))
        members = member
        row += height
    num_axes = 3 if len(parts[0]) > 1 else num_axes
    shape3 = (members, row, columns)
    return ArrayPlan(field.name, field.dtype, shape3[3 - num_axes :], tuple(copies))


def _tensor_slice(source: SourceMatrix, field: MatrixField, share: RankShare | None) -> TensorSlice:
    ranges = _ranges(source, share)
    if len(source.paths) > 1:
        ranges.pop("stack", None)  # already selected by path
    return TensorSlice(source, field.per, field.values, **ranges)


def _ranges(source: SourceMatrix, share: RankShare | None) -> dict[str, Range]:
    """Return a rank's range of each sharded axis, in rows, columns or members."""
    if share is None:
        return {}
    ranges = ((axis, share.range_of(axis.share_field)) for axis in source.sharded_axes)
    return {axis.axis: Range(span.start * axis.unit, span.stop * axis.unit) for axis, span in ranges}


def _num_axes(source: SourceMatrix) -> int:
    """Return the number of axes of a source's slice."""
    return 3 if source.heads is not None or source.blocks else len(source.shape)
