"""Locations of the bytes of routed experts on disk: in records or stacks of a store, or in a checkpoint's tensors.

Pure data; kimi_mlx.weights.expert_reader reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.parallel.placement import RankShare
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.expert_plan import ExpertArray, ExpertsPlan, RecordLayout, split_experts
from kimi_mlx.weights.expert_tag import ExpertTag
from kimi_mlx.weights.header import DTYPE_BYTES, TensorInfo
from kimi_mlx.weights.layer_plan import plan_layer
from kimi_mlx.weights.plan import ArrayPlan, SliceCopy, as_shape3


@dataclass(frozen=True)
class Target:
    """Destination of some stored bytes.

    Args:
        array: index of the array in ExpertSource.arrays.
        start: first byte in the array, in its stored type.
        decode: `copy`, or `biases`, which are computed from the scales of packed integers.
    """

    array: int
    start: int
    decode: Literal["copy", "biases"] = "copy"


@dataclass(frozen=True)
class Span:
    """Consecutive bytes with the same destinations; padding has none."""

    num_bytes: int
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True, eq=False)
class Run:
    """Bytes of an expert that are contiguous in a file. Different experts may be in different files.

    Args:
        spans: the bytes, in order.
        files: files of the experts.
        file_numbers: for each expert, the index of its file.
        offsets: for each expert, the first byte in its file.
    """

    spans: tuple[Span, ...]
    files: tuple[Path, ...]
    file_numbers: np.ndarray
    offsets: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(span.num_bytes for span in self.spans)

    def location(self, index: int) -> tuple[Path, int]:
        """Return the file and the first byte of an expert, numbered from the first on this rank."""
        return self.files[self.file_numbers[index]], int(self.offsets[index])


@dataclass(frozen=True, eq=False)
class ExpertSource:
    """The routed experts of one layer that a rank holds, on disk.

    Args:
        layer: number of the layer.
        first_expert: number of the first expert.
        num_experts: number of experts.
        arrays: arrays of an expert as stored, always in this order.
        runs: parts of an expert that are contiguous on disk.
        hint: remedy for a damaged file.
        tag: tag at the end of each record; None if the experts are not in records.
    """

    layer: int
    first_expert: int
    num_experts: int
    arrays: tuple[ExpertArray, ...]
    runs: tuple[Run, ...]
    hint: str
    tag: ExpertTag | None = None

    @property
    def expert_bytes(self) -> int:
        """Bytes that reading one expert takes from the disk, with padding."""
        return sum(run.num_bytes for run in self.runs)

    @property
    def files(self) -> frozenset[Path]:
        """All files with experts of the layer."""
        return frozenset(file for run in self.runs for file in run.files)


def record_source(
    layer: int,
    first_expert: int,
    table: TensorInfo,
    arrays: Sequence[ExpertArray],
    record: RecordLayout,
    tag: ExpertTag,
    hint: str,
) -> ExpertSource:
    """Return the source of experts in records.

    Args:
        layer: number of the layer.
        first_expert: number of the first expert.
        table: location of the array of records, (num_experts, record_bytes).
        arrays: arrays of an expert.
        record: layout of a record.
        tag: tag of the records.
        hint: as in ExpertSource.
    """
    num_experts, record_bytes = table.shape
    spans: list[Span] = []
    ends = (*record.offsets[1:], record_bytes)
    for number, (array, start, end) in enumerate(zip(arrays, record.offsets, ends, strict=True)):
        spans.append(Span(array.size_bytes, (Target(number, 0),)))
        spans.append(Span(end - start - array.size_bytes))
    run = _strided_run(tuple(span for span in spans if span.num_bytes), table, num_experts, record_bytes)
    return ExpertSource(layer, first_expert, num_experts, tuple(arrays), (run,), hint, tag)


def stack_source(
    layer: int, first_expert: int, num_experts: int, stacks: Sequence[tuple[ExpertArray, TensorInfo]], hint: str
) -> ExpertSource:
    """Return the source of experts in stacks, one for each array.

    Args:
        layer: number of the layer.
        first_expert: number of the first expert.
        num_experts: number of routed experts; a stack may have shared ones after them.
        stacks: each array of an expert, and the location of its stack, (members, rows, columns).
        hint: as in ExpertSource.
    """
    runs = tuple(
        _strided_run((Span(array.size_bytes, (Target(number, 0),)),), table, num_experts, array.size_bytes)
        for number, (array, table) in enumerate(stacks)
    )
    return ExpertSource(layer, first_expert, num_experts, tuple(array for array, _ in stacks), runs, hint)


def checkpoint_sources(checkpoint: Checkpoint, share: RankShare | None, hint: str) -> list[ExpertSource]:
    """Return the sources of all layers with routed experts that a rank holds.

    Args:
        checkpoint: table of its tensors; their files must be paths on this machine.
        share: share of the rank; None for everything.
        hint: as for checkpoint_source.

    Raises:
        WeightsError: as for checkpoint_source, or tensors are missing or wrongly stored.
    """
    sources: list[ExpertSource] = []
    for layer in range(checkpoint.config.num_hidden_layers):
        _, experts = split_experts(plan_layer(checkpoint, layer, share))
        if experts is not None:
            sources.append(checkpoint_source(checkpoint, layer, experts, hint))
    return sources


def checkpoint_source(checkpoint: Checkpoint, layer: int, experts: ExpertsPlan, hint: str) -> ExpertSource:
    """Return the source of experts in the files of a checkpoint.

    Args:
        checkpoint: table of its tensors; their files must be paths on this machine.
        layer: number of the layer.
        experts: the experts that this rank holds.
        hint: command that builds a store, from which every share of every format can be read.

    Raises:
        WeightsError: the rank's share of an expert is not contiguous in the files, or it must be decoded.
    """
    runs: list[Run] = []
    run_of_tensor: dict[tuple[str, int], int] = {}
    for number, plan in enumerate(experts.plans):
        by_row: dict[int, list[SliceCopy]] = {}
        for copy in plan.copies:
            by_row.setdefault(copy.row, []).append(copy)
        for row, copies in sorted(by_row.items()):
            field = copies[0].field
            target = Target(number, row * _row_bytes(plan), "biases" if field.decode == "biases" else "copy")
            key = (field.tensors[0], row)
            if (known := run_of_tensor.get(key)) is not None:  # biases, computed from scales that are already read
                (span,) = runs[known].spans
                runs[known] = _with_spans(runs[known], (Span(span.num_bytes, (*span.targets, target)),))
                continue
            run_of_tensor[key] = len(runs)
            runs.append(_copies_run(checkpoint, layer, copies, target, experts.num_experts, hint))
    return ExpertSource(layer, experts.first_expert, experts.num_experts, experts.arrays, tuple(runs), hint)


def _copies_run(
    checkpoint: Checkpoint, layer: int, copies: Iterable[SliceCopy], target: Target, num_experts: int, hint: str
) -> Run:
    """Return the run of some rows of one array of each expert."""
    files: dict[Path, int] = {}
    file_numbers, offsets = np.zeros(num_experts, np.int32), np.zeros(num_experts, np.int64)
    num_bytes = 0
    for copy in copies:
        name = copy.field.tensors[0]
        table = checkpoint.tensors[name]
        location = _contiguous_rows(table, copy)
        if location is None:
            kind = "a part of each row of" if copy.field.decode in ("copy", "biases") else "a conversion of"
            raise WeightsError(
                f"experts of layer {layer} cannot be read one by one from `{table.file}`: this rank needs {kind} "
                f"the tensor `{name}`",
                hint=hint,
            )
        start, stride, num_bytes = location
        members = slice(copy.member, copy.member + copy.shape[0])
        file_numbers[members] = files.setdefault(table.file, len(files))
        offsets[members] = start + stride * np.arange(copy.shape[0])
    return Run((Span(num_bytes, (target,)),), tuple(files), file_numbers, offsets)


def _contiguous_rows(table: TensorInfo, copy: SliceCopy) -> tuple[int, int, int] | None:
    """Return first byte, bytes from one member to the next, and bytes of a member; None if it is not contiguous."""
    part = copy.tensor_slice
    _, rows, columns = as_shape3(table.shape)
    if copy.field.decode not in ("copy", "biases") or copy.shape[2] != columns:
        return None
    row_bytes = columns * DTYPE_BYTES[table.dtype]
    first_member = 0 if part.stack is None else part.stack.start
    first_row = 0 if part.rows is None else part.rows.start
    return table.start + (first_member * rows + first_row) * row_bytes, rows * row_bytes, copy.shape[1] * row_bytes


def _row_bytes(plan: ArrayPlan) -> int:
    return plan.shape[-1] * DTYPE_BYTES[plan.dtype]


def _strided_run(spans: tuple[Span, ...], table: TensorInfo, num_experts: int, stride: int) -> Run:
    offsets = table.start + stride * np.arange(num_experts, dtype=np.int64)
    return Run(spans, (table.file,), np.zeros(num_experts, np.int32), offsets)


def _with_spans(run: Run, spans: tuple[Span, ...]) -> Run:
    return Run(spans, run.files, run.file_numbers, run.offsets)
