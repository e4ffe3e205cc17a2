"""Plan the arrays of a layer: which slices of which stored tensors fill them.

A plan depends only on headers, configuration and a rank's share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.names import SourceMatrix, TreeEntry, is_latent_first, layer_entries, num_fused_shared, top_entries
from kimi_mlx.model.vision_names import vision_entries
from kimi_mlx.parallel.placement import SHARDED_AXES, Range, RankShare, SplitGranularity, parse_strategy
from kimi_mlx.weights.checkpoint import Checkpoint, CheckpointTensors, read_checkpoint
from kimi_mlx.weights.matrix_format import MatrixField, MatrixFormat
from kimi_mlx.weights.plan import ArrayPlan, LayerPlan, SliceCopy, TensorSlice, WeightPlan

Member = tuple[SourceMatrix, MatrixFormat]
"""A matrix of a stack, and its stored format."""


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
        plan_entries(checkpoint, layer_entries(config, layer, layout, fuses_shared), share),
        latent_first=is_latent_first(layer, layout),
        num_fused_shared=num_fused_shared(config, layer, layout) if fuses_shared else 0,
        first_expert=0 if share is None else share.experts.start,
    )


def plan_top(checkpoint: Checkpoint, share: RankShare | None) -> LayerPlan:
    """Plan the embedding, the last norm and the head."""
    plan = LayerPlan(plan_entries(checkpoint, top_entries(checkpoint.config), share))
    if "lm_head" not in plan.entries:
        plan.entries.pop("model.norm")
    return plan


def plan_vision(checkpoint: Checkpoint, share: RankShare | None) -> LayerPlan:
    """Plan the vision tower and its projector: all of it on one rank, nothing on the others.

    The plan is empty for a checkpoint without a tower.
    """
    config = checkpoint.config.vision
    if config is None or not checkpoint.has_vision or (share is not None and not share.has_vision):
        return LayerPlan({})
    return LayerPlan(plan_entries(checkpoint, vision_entries(config, checkpoint.layout), share))


def check_checkpoint(folder: Path, config: ModelConfig) -> None:
    """Check names, types and shapes of all tensors of a checkpoint by the headers of its files.

    Raises:
        WeightsError: a file or tensor is missing, broken or unknown, or has a wrong type or shape.
    """
    checkpoint = read_checkpoint(folder, config)
    for layer in range(config.num_hidden_layers):
        plan_layer(checkpoint, layer, None)
    plan_top(checkpoint, None)
    plan_vision(checkpoint, None)


def plan_source(checkpoint: Checkpoint, source: SourceMatrix) -> list[WeightPlan]:
    """Plan a whole source matrix, not fused with others, as a conversion reads it.

    Returns:
        One plan; several if experts are stored in different formats. Each member is at its place in the whole stack.
    """
    plans: list[WeightPlan] = []
    member = 0
    for _, group in groupby(_members(checkpoint, (source,), None), key=lambda item: item[1].kind):
        members = list(group)
        plans.append(_plan_weight(checkpoint, [members], None, member))
        member += len(members)
    return plans


def split_granularity_of(checkpoint: Checkpoint, strategy: str) -> SplitGranularity:
    """Return the smallest parts into which the matrices can be split without splitting quantization groups."""
    fuses_shared = "experts" not in SHARDED_AXES[parse_strategy(strategy)[0]]
    units: dict[str, int] = {}
    for layer in range(checkpoint.config.num_hidden_layers):
        for entry in layer_entries(checkpoint.config, layer, checkpoint.layout, fuses_shared):
            for source in (source for part in entry.parts for source in part):
                for axis in source.sharded_axes:
                    if axis.axis == "columns":
                        quantization = checkpoint.matrices.quantization(source.paths[0])
                        group = quantization.group_size if quantization is not None else 1
                        unit = group // math.gcd(group, axis.unit)
                        units[axis.share_field] = math.lcm(units.get(axis.share_field, 1), unit)
    return SplitGranularity(*map(units.get, ("heads", "expert_rows", "shared_rows", "dense_rows")))


def plan_entries(
    checkpoint: CheckpointTensors, entries: list[TreeEntry], share: RankShare | None
) -> dict[str, tuple[WeightPlan, ...]]:
    """Plan a rank's share of entries, without those that it does not hold.

    Raises:
        WeightsError: missing or wrongly stored tensors.
    """
    return {entry.name: _plan_entry(checkpoint, entry, share) for entry in entries if _holds(share, entry)}


def _holds(share: RankShare | None, entry: TreeEntry) -> bool:
    """Return whether a rank has a share of an entry."""
    axes = (axis for part in entry.parts for source in part for axis in source.sharded_axes)
    return share is None or all(len(share.range_of(axis.share_field)) for axis in axes)


def _plan_entry(checkpoint: CheckpointTensors, entry: TreeEntry, share: RankShare | None) -> tuple[WeightPlan, ...]:
    """Plan an entry; fuse its parts into one weight if their types and quantizations are equal."""
    parts = [_members(checkpoint, part, share) for part in entry.parts]
    for members in parts:
        if len({matrix.kind for _, matrix in members}) > 1:
            stored = " and ".join(sorted({"/".join(matrix.kind[0]) for _, matrix in members}))
            raise WeightsError(
                f"`{checkpoint.location}` stores `{members[0][0].paths[0]}` and other experts of its layer in "
                f"different types: {stored}",
                hint="`kimi-mlx convert` with --expert-bits gives them one format",
            )
    if len({members[0][1].kind for members in parts}) > 1:
        return tuple(_plan_weight(checkpoint, [members], share) for members in parts)
    return (_plan_weight(checkpoint, parts, share),)


def _members(checkpoint: CheckpointTensors, sources: Sequence[SourceMatrix], share: RankShare | None) -> list[Member]:
    """Return the matrices that are stacked into one part, with their stored formats."""
    return [
        (source, checkpoint.matrices.format_of(path, source))
        for source in sources
        for path in _held_paths(source, share)
    ]


def _held_paths(source: SourceMatrix, share: RankShare | None) -> Sequence[str]:
    """Return the paths of a source's matrices in a rank's share: some of them if a stack is stored one by one."""
    span = _ranges(source, share).get("stack")
    return source.paths if span is None or len(source.paths) == 1 else source.paths[span.start : span.stop]


def _plan_weight(
    checkpoint: CheckpointTensors, parts: list[list[Member]], share: RankShare | None, first_member: int = 0
) -> WeightPlan:
    """Plan the fusion of parts: concatenate their rows; each part is a stack of its members.

    Args:
        checkpoint: the checkpoint.
        parts: members of each part, all stored in the same format.
        share: share of the rank; None for everything.
        first_member: place of the first member in the destination.
    """
    matrix = parts[0][0][1]
    numbers = range(len(matrix.fields))
    arrays = tuple(_plan_array(checkpoint, parts, number, share, first_member) for number in numbers)
    return WeightPlan(arrays, matrix.quantization)


def _plan_array(
    checkpoint: CheckpointTensors, parts: list[list[Member]], number: int, share: RankShare | None, first_member: int
) -> ArrayPlan:
    """Plan one field of a weight: (members, sum of the parts' rows, columns), or without the first axis."""
    copies: list[SliceCopy] = []
    field = parts[0][0][1].fields[number]
    row = num_members = num_axes = columns = 0
    for part in parts:
        num_members = height = 0
        for source, matrices in groupby(part, key=lambda item: item[0]):  # matrices of a source have equal shapes
            fields = [matrix.fields[number] for _, matrix in matrices]
            tensor_slice = _tensor_slice(source, fields[0], share)
            shape = tensor_slice.shape3(_decoded_shape(checkpoint, source, fields[0]))
            for member_field in fields:
                copies.append(SliceCopy(member_field, tensor_slice, shape, first_member + num_members, row))
                num_members += shape[0]
            _, height, columns = shape
            num_axes = max(num_axes, _num_axes(source))
        row += height
    num_axes = 3 if len(parts[0]) > 1 else num_axes
    shape3 = (num_members, row, columns)
    return ArrayPlan(field.name, field.dtype, shape3[3 - num_axes :], tuple(copies))


def _decoded_shape(checkpoint: CheckpointTensors, source: SourceMatrix, field: MatrixField) -> tuple[int, ...]:
    """Return the shape of a whole field in the canonical form."""
    is_computed = field.decode == "dequantize" or source.kernel is not None
    return source.shape if is_computed else checkpoint.tensors[field.tensors[0]].shape


def _tensor_slice(source: SourceMatrix, field: MatrixField, share: RankShare | None) -> TensorSlice:
    ranges = _ranges(source, share)
    if len(source.paths) > 1:
        ranges.pop("stack", None)  # already selected by path
    return TensorSlice(source, field.packing, **ranges)


def _ranges(source: SourceMatrix, share: RankShare | None) -> dict[str, Range]:
    """Return a rank's range of each sharded axis, in rows, columns or members."""
    if share is None:
        return {}
    ranges = ((axis, share.range_of(axis.share_field)) for axis in source.sharded_axes)
    return {axis.axis: Range(span.start * axis.unit, span.stop * axis.unit) for axis, span in ranges}


def _num_axes(source: SourceMatrix) -> int:
    """Return the number of axes of a source's slice."""
    return 3 if source.heads is not None or source.blocks else len(source.shape)
