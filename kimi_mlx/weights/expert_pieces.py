"""Read the pieces of routed experts from files into arrays.

An expert is divided into pieces that several threads read at once, so that a single expert also keeps the disk busy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.uncached_file import IO_ALIGNMENT, UncachedFile, aligned_buffer, is_aligned
from kimi_mlx.weights.expert_plan import round_up
from kimi_mlx.weights.expert_source import ExpertSource, Run, Span, Target
from kimi_mlx.weights.expert_tag import TAG_BYTES, describe_tag
from kimi_mlx.weights.header import DTYPE_BYTES
from kimi_mlx.weights.matrix_format import FLOATS
from kimi_mlx.weights.packed_int4 import affine_biases
from kimi_mlx.weights.reader import NUMPY_TYPES, cast_floats


@dataclass(frozen=True)
class Piece:
    """A part of a run that one thread reads at once.

    Args:
        run: the run.
        start: first byte in it; a multiple of IO_ALIGNMENT.
        spans: the bytes.
        has_tag: whether the piece ends with the tag of the record.
    """

    run: Run
    start: int
    spans: tuple[Span, ...]
    has_tag: bool = False

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the piece."""
        return sum(span.num_bytes for span in self.spans)


class Scratch:
    """Aligned memory of a thread, for bytes that cannot be read into their destination."""

    def __init__(self) -> None:
        self.data = aligned_buffer(0)

    def reserve(self, num_bytes: int) -> None:
        """Make room for this number of bytes."""
        if self.data.nbytes < num_bytes:
            self.data = aligned_buffer(num_bytes)


class PreparedLayer:
    """A layer's source, prepared for reading.

    Args:
        source: the source.
        float_dtype: compute type.
        piece_bytes: maximum size of a piece.
        files: open files.
    """

    def __init__(self, source: ExpertSource, float_dtype: str, piece_bytes: int, files: Mapping[Path, UncachedFile]):
        self.source, self._files = source, files
        self.arrays = tuple(
            replace(array, dtype=float_dtype) if array.dtype in FLOATS else array for array in source.arrays
        )
        self.pieces = [piece for run in source.runs for piece in divide_run(run, piece_bytes, source.tag is not None)]

    def label(self, expert: int) -> str:
        """Return the name of an expert in messages."""
        return f"expert {expert} of layer {self.source.layer}"

    def read_piece(self, number: int, expert: int, destination: Sequence[np.ndarray], scratch: Scratch) -> int:
        """Read a piece of an expert into its destination; return the number of bytes.

        Args:
            number: index in `pieces`.
            expert: number of the expert in the model.
            destination: arrays to fill.
            scratch: memory of the thread.

        Raises:
            WeightsError: the disk fails, the file ends early, or the record has the tag of another expert.
        """
        piece = self.pieces[number]
        path, start = piece.run.location(expert - self.source.first_expert)
        offset = start + piece.start
        file = self._files[path]
        is_direct = file.is_direct and not (offset % IO_ALIGNMENT or piece.num_bytes % IO_ALIGNMENT)
        buffers, decoded, tag = self._buffers(piece, destination, is_direct, scratch)
        label = f"{self.label(expert)}: bytes {offset} to {offset + piece.num_bytes} of `{path}`"
        try:
            num_bytes = file.read(buffers, offset)
        except OSError as error:
            hint = f"check the disk; {self.source.hint}"
            raise WeightsError(f"{label} cannot be read: {error.strerror}", hint=hint) from error
        if num_bytes < piece.num_bytes:
            raise WeightsError(
                f"{label} are not there: the file has {file.current_bytes()} bytes", hint=self.source.hint
            )
        if tag is not None:
            self._check_tag(expert, f"`{path}` has", offset + piece.num_bytes - TAG_BYTES, tag.tobytes())
        for data, target in decoded:
            self._decode(data, target, destination[target.array])
        return num_bytes

    def _buffers(
        self, piece: Piece, destination: Sequence[np.ndarray], is_direct: bool, scratch: Scratch
    ) -> tuple[list[np.ndarray], list[tuple[np.ndarray, Target]], np.ndarray | None]:
        """Return the buffers to fill, their parts to convert afterwards with the targets, and the bytes of the tag.

        A direct read needs buffers with aligned addresses and lengths. Spans without such a destination are read into
        `scratch`.
        """
        scratch.reserve(piece.num_bytes + IO_ALIGNMENT * len(piece.spans))
        buffers: list[np.ndarray] = []
        decoded: list[tuple[np.ndarray, Target]] = []
        data = scratch.data[:0]
        first = stop = position = 0  # the next buffer in `scratch`, and the position in the piece
        for span in piece.spans:
            view = self._view(span, destination)
            if is_direct and (position % IO_ALIGNMENT or view is None or not is_aligned(view)):
                view = None
            position += span.num_bytes
            if view is None:
                data = scratch.data[stop : stop + span.num_bytes]
                stop += span.num_bytes
                decoded += [(data, target) for target in span.targets]
                continue
            if stop > first:
                buffers.append(scratch.data[first:stop])
                first = stop = round_up(stop, IO_ALIGNMENT)
            buffers.append(view)
        if stop > first:
            buffers.append(scratch.data[first:stop])
        return buffers, decoded, data[-TAG_BYTES:] if piece.has_tag else None

    def _view(self, span: Span, destination: Sequence[np.ndarray]) -> np.ndarray | None:
        """Return the bytes of the destination that a span fills without conversion; None if it needs one."""
        if len(span.targets) != 1 or span.targets[0].decode != "copy":
            return None
        (target,) = span.targets
        if self.arrays[target.array].dtype != self.source.arrays[target.array].dtype:
            return None
        return destination[target.array].reshape(-1).view(np.uint8)[target.start : target.start + span.num_bytes]

    def _decode(self, data: np.ndarray, target: Target, destination: np.ndarray) -> None:
        """Convert stored bytes, and write them into an array."""
        stored, array = self.source.arrays[target.array], self.arrays[target.array]
        values = data.view(NUMPY_TYPES[stored.dtype])
        if target.decode == "biases":
            assert array.quantization is not None
            values = affine_biases(values, array.quantization.bits)
        if stored.dtype != array.dtype:
            values = cast_floats(values, stored.dtype, array.dtype)
        first = target.start // DTYPE_BYTES[stored.dtype]
        flat = destination.reshape(-1)
        flat[first : first + values.size] = values.view(flat.dtype)

    def _check_tag(self, expert: int, label: str, offset: int, found: bytes) -> None:
        assert self.source.tag is not None
        expected = self.source.tag.to_bytes(expert)
        if found != expected:
            raise WeightsError(
                f"{label} {describe_tag(found)} at byte {offset}, not {describe_tag(expected)}", hint=self.source.hint
            )


def divide_run(run: Run, piece_bytes: int, has_tag: bool) -> list[Piece]:
    """Divide a run into pieces of about equal size, which begin at multiples of IO_ALIGNMENT."""
    count = -(-run.num_bytes // piece_bytes)
    size = round_up(-(-run.num_bytes // count), IO_ALIGNMENT)
    pieces: list[Piece] = []
    spans: list[Span] = []
    start = position = 0
    for span in run.spans:
        done = 0
        while done < span.num_bytes:
            length = min(span.num_bytes - done, start + size - position)
            targets = tuple(replace(target, start=target.start + done) for target in span.targets)
            spans.append(Span(length, targets))
            done += length
            position += length
            if position == start + size:
                pieces.append(Piece(run, start, tuple(spans)))
                spans, start = [], position
    if spans:
        pieces.append(Piece(run, start, tuple(spans)))
    if has_tag:
        pieces[-1] = replace(pieces[-1], has_tag=True)
    return pieces
