"""Slots for routed experts in arrays that MLX computes on. Threads write into some slots while MLX reads others.

MLX's gather_qmm takes a stack of matrices and an index into it for each row. So an expert can be at any index, and its
outputs have the same bits there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.aligned_array import aligned_array, shared_view
from kimi_mlx.model.expert_format import ExpertFormat


class ExpertRead(Protocol):
    """A read of one expert; see kimi_mlx.weights.expert_reader."""

    @property
    def is_done(self) -> bool:
        """Whether the read has ended, with or without an error."""
        ...

    def cancel(self) -> bool:
        """Cancel the read unless it has begun, so that nothing is written; return whether it is cancelled."""
        ...

    def promote(self) -> None:
        """Give a guess the priority of a read that a step waits for."""
        ...

    def result(self) -> None:
        """Wait until the expert is in its destination.

        Raises:
            WeightsError: the expert cannot be read, or the reader was closed.
        """
        ...


class SlotReader(Protocol):
    """Reads experts into slots with its own threads, in the order of requests; see kimi_mlx.weights.expert_reader."""

    def read(self, layer: int, expert: int, destination: Sequence[np.ndarray], is_guess: bool = False) -> ExpertRead:
        """Request a read. Does not wait.

        Args:
            layer: number of the layer in the model.
            expert: number of the expert in the model, also if the rank holds only some experts.
            destination: contiguous arrays, one for each array of ExpertFormat.arrays, bfloat16 as uint16. The read
                holds references to them until it has ended.
            is_guess: whether reads that a step waits for come first.
        """
        ...

    def close(self) -> None:
        """Cancel the reads that have not begun, wait for the others, and close the files. Safe from any thread."""
        ...


class Launch:
    """A computation launched on MLX that reads slots.

    Args:
        outputs: all outputs of the computation, not evaluated. Their evaluation starts here.
    """

    def __init__(self, *outputs: mx.array):
        # A tiny array that is ready when the outputs are, so that these can be freed.
        self.marker: mx.array | None = mx.depends(mx.zeros((1,)), list(outputs))
        mx.async_eval(*outputs, self.marker)

    @property
    def has_ended(self) -> bool:
        """Whether the computation is known to have ended."""
        return self.marker is None

    def on_evaluated(self) -> None:
        """Record that `marker` was evaluated, so that the computation has ended."""
        self.marker = None

    def wait(self) -> None:
        """Wait until the computation has ended."""
        if self.marker is not None:
            mx.eval(self.marker)
            self.on_evaluated()


@dataclass(eq=False)
class Slot:
    """Memory for one expert.

    Args:
        stack: stack that the slot is part of.
        index: index in the stack.
        read: read into the slot that nothing has waited for yet; None if there is none.
        launch: last computation that reads the slot; None if there was none since the last read.
    """

    stack: SlotStack
    index: int
    read: ExpertRead | None = None
    launch: Launch | None = None

    def begin_read(self, reader: SlotReader, layer: int, expert: int, is_guess: bool = False) -> None:
        """Request a read into the slot, while no computation reads the slot.

        Args:
            reader: reader of experts.
            layer: number of the layer in the model.
            expert: number of the expert in the model.
            is_guess: whether other reads come first.
        """
        assert self.read is None, f"another expert is being read into the slot of expert {expert} of layer {layer}"
        assert self.launch is None or self.launch.has_ended, (
            f"a step still computes with the slot into which expert {expert} of layer {layer} would be read"
        )
        self.launch = None
        self.read = reader.read(layer, expert, self.stack.destination(self.index), is_guess)

    def end_read(self) -> None:
        """Wait for the read into the slot.

        Raises:
            WeightsError: the read failed.
        """
        assert self.read is not None
        read, self.read = self.read, None
        read.result()


class SlotStack:
    """Arrays that hold several experts of one format, each in a slot.

    Args:
        format: format of the experts.
        num_slots: number of slots, at least one.
    """

    def __init__(self, format: ExpertFormat, num_slots: int):
        self.format, self.num_slots = format, num_slots
        self.arrays = [aligned_array((num_slots, *array.shape), array.dtype) for array in format.arrays]
        self._views = [shared_view(array) for array in self.arrays]
        self.gate_up_proj, self.down_proj = format.modules(self.arrays)

    def destination(self, index: int) -> list[np.ndarray]:
        """Return the memory of a slot: one numpy array for each array of the format."""
        return [view[index] for view in self._views]

    def fill(self, sources: Sequence[mx.array]) -> None:
        """Copy experts into the first slots.

        Args:
            sources: evaluated stacks of experts, one for each array of the format.
        """
        for view, source in zip(self._views, sources, strict=True):
            view[: source.shape[0]] = shared_view(source)


class StagingArea:
    """Slots that all layers with one format of experts share.

    Args:
        format: format of the experts.
        num_slots: number of slots.
    """

    def __init__(self, format: ExpertFormat, num_slots: int):
        self.stack = SlotStack(format, num_slots)
        self.num_slots = num_slots
        self._free = [Slot(self.stack, index) for index in reversed(range(num_slots))]
        self._busy: list[Slot] = []

    def take(self) -> Slot | None:
        """Return a free slot; None if there is none."""
        if not self._free:
            self._collect()
        return self._free.pop() if self._free else None

    def release(self, slot: Slot) -> None:
        """Release a slot. It becomes free when its read and the computation on it have ended."""
        self._busy.append(slot)

    def wait_for_launch(self) -> bool:
        """Wait for the oldest computation on a released slot; return False if there is none."""
        self._collect()
        launch = next((slot.launch for slot in self._busy if slot.launch is not None), None)
        if launch is not None:
            launch.wait()
        return launch is not None

    def wait_for_read(self) -> bool:
        """Wait for the oldest read into a released slot; return False if there is none."""
        slot = next((slot for slot in self._busy if slot.read is not None), None)
        if slot is not None:
            _end_unwanted_read(slot)
        return slot is not None

    def _collect(self) -> None:
        busy: list[Slot] = []
        for slot in self._busy:
            if slot.read is not None and slot.read.is_done:
                _end_unwanted_read(slot)
            is_free = slot.read is None and (slot.launch is None or slot.launch.has_ended)
            (self._free if is_free else busy).append(slot)
        self._busy = busy


def _end_unwanted_read(slot: Slot) -> None:
    with contextlib.suppress(WeightsError):  # a step that needs the expert reads it again
        slot.end_read()
