"""The routed experts of one layer on a rank: their slots, and the order in which they are evicted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.expert_format import RoutedExperts
from kimi_mlx.model.expert_slots import ExpertRead, Slot, SlotReader, SlotStack, StagingArea

FREE, BUSY = -1, -2
"""Owners of a slot without an expert: an empty slot, and one that is being read into."""


@dataclass(frozen=True, eq=False)
class Guess:
    """A read that was requested before the router had chosen (a prefetch).

    Args:
        slot: slot of the expert.
        previous: owner of the slot before: an expert, FREE or BUSY.
    """

    slot: Slot
    previous: int


class LayerExperts:
    """The routed experts of one layer. They are numbered from the first on this rank.

    Args:
        index: index among the layers with routed experts.
        layer: number of the layer in the model.
        routed: the experts.
        first: number of the first expert in the model.
        shared: stacks of the shared experts that are computed like routed ones, one for each array; empty without any.
        num_kept: number of slots of the layer.
        staging: staging area.
        reader: reader of experts.
    """

    def __init__(
        self,
        index: int,
        layer: int,
        routed: RoutedExperts,
        first: int,
        shared: Sequence[mx.array],
        num_kept: int,
        staging: StagingArea,
        reader: SlotReader,
    ):
        self.index, self.layer, self.num_experts, self.num_kept = index, layer, routed.num_experts, num_kept
        self.staging, self.stored_bytes = staging, routed.stored_bytes
        self.num_reads = 0
        """Number of reads that were requested and not cancelled."""
        self._first, self._reader = first, reader
        self._num_shared = shared[0].shape[0] if shared else 0
        num_slots = self._num_shared + num_kept
        self.stack = SlotStack(routed.format, num_slots) if num_slots else None
        self._kept: list[Slot] = []
        if self.stack is not None:
            self._kept = [Slot(self.stack, index) for index in range(self._num_shared, num_slots)]
            if shared:
                self.stack.fill(shared)
        self.owners = np.full(num_kept, FREE)
        """Owner of each of the layer's own slots: an expert, FREE or BUSY."""
        self._slots: dict[int, Slot] = {}
        self._guesses: dict[int, Guess] = {}
        self._unwanted: list[tuple[int, Slot, ExpertRead]] = []

    @property
    def shared_slots(self) -> dict[int, int]:
        """Indices of the fused shared experts in the stack; their numbers follow those of the routed experts."""
        return {self.num_experts + index: index for index in range(self._num_shared)}

    def __contains__(self, expert: int) -> bool:
        """Return whether an expert is in a slot, or is being read into one."""
        return expert in self._slots

    def slot(self, expert: int) -> Slot:
        """Return the slot of an expert."""
        return self._slots[expert]

    def is_kept(self, slot: Slot) -> bool:
        """Return whether a slot is the layer's own, not of the staging area."""
        return slot.stack is self.stack

    def kept_slot(self, position: int) -> Slot:
        """Return one of the layer's own slots."""
        return self._kept[position]

    def slot_allocator(self, scores: np.ndarray, pinned: Iterable[int]) -> SlotAllocator:
        """Return an allocator of slots for experts that are about to be read.

        Args:
            scores: score of each expert.
            pinned: experts that must not be evicted.
        """
        by_owner = np.append(scores, (np.inf, -1.0))  # the last two are at BUSY and FREE
        by_owner[list(pinned)] = np.inf
        return SlotAllocator(self, by_owner[self.owners])

    def begin_read(self, expert: int, slot: Slot, is_guess: bool = False) -> None:
        """Request the read of an expert into a slot, and evict the expert that the slot has."""
        previous = BUSY
        if self.is_kept(slot):
            previous = int(self.owners[slot.index - self._num_shared])
            self._slots.pop(previous, None)
            self._set_owner(slot, BUSY)
        self._slots[expert] = slot
        slot.begin_read(self._reader, self.layer, self._first + expert, is_guess)
        self.num_reads += 1
        if is_guess:
            self._guesses[expert] = Guess(slot, previous)

    def finish_read(self, expert: int) -> None:
        """Wait for the read of an expert.

        Raises:
            WeightsError: the expert could not be read; its slot is free now.
        """
        slot = self._slots[expert]
        try:
            slot.end_read()
        except WeightsError:
            self._remove(expert, slot)
            raise
        self._set_owner(slot, expert)

    def release(self, expert: int) -> None:
        """Release the slot of an expert if it is in the staging area."""
        slot = self._slots[expert]
        if not self.is_kept(slot):
            self._remove(expert, slot)

    def check_guesses(self, needed: set[int]) -> tuple[int, int]:
        """Cancel wrong guesses, and promote correct ones.

        Returns:
            Number of correct guesses, and number of wrong ones that were cancelled in time.
        """
        guesses, self._guesses = self._guesses, {}
        num_right = num_cancelled = 0
        for expert, guess in guesses.items():
            if expert not in needed:
                num_cancelled += self._cancel(expert, guess)
                continue
            num_right += 1
            if guess.slot.read is not None:
                guess.slot.read.promote()
        self._collect_unwanted()
        return num_right, num_cancelled

    def discard(self) -> int:
        """Release all slots of the staging area after a failed step; return the number of cancelled guesses."""
        _, num_cancelled = self.check_guesses(set())
        for expert, slot in list(self._slots.items()):
            if not self.is_kept(slot):
                self._remove(expert, slot)
            elif slot.read is not None:
                self._unwanted.append((expert, slot, slot.read))
        return num_cancelled

    def _cancel(self, expert: int, guess: Guess) -> bool:
        """Cancel a wrong guess; return False if its read has begun, and so continues."""
        slot = guess.slot
        assert slot.read is not None
        if slot.read.cancel():
            self.num_reads -= 1
            slot.read = None
            self._remove(expert, slot)
            if guess.previous >= 0:  # nothing was written
                self._slots[guess.previous] = slot
                self._set_owner(slot, guess.previous)
            return True
        if self.is_kept(slot):
            self._unwanted.append((expert, slot, slot.read))
        else:
            self._remove(expert, slot)
        return False

    def _collect_unwanted(self) -> None:
        """Finish reads of wrong guesses into the layer's own slots that have ended."""
        reading: list[tuple[int, Slot, ExpertRead]] = []
        for expert, slot, read in self._unwanted:
            if slot.read is not read:  # a step has waited for it after all
                continue
            if read.is_done:
                with contextlib.suppress(WeightsError):  # the step that needs the expert reads it again
                    self.finish_read(expert)
            else:
                reading.append((expert, slot, read))
        self._unwanted = reading

    def _set_owner(self, slot: Slot, owner: int) -> None:
        if self.is_kept(slot):
            self.owners[slot.index - self._num_shared] = owner

    def _remove(self, expert: int, slot: Slot) -> None:
        del self._slots[expert]
        self._set_owner(slot, FREE)
        if not self.is_kept(slot):
            self.staging.release(slot)


class SlotAllocator:
    """Slots for experts that are about to be read: those of less used experts, else free ones of the staging area.

    Args:
        experts: the layer.
        scores: score of the expert in each of the layer's own slots; infinite if it must not be evicted.
    """

    def __init__(self, experts: LayerExperts, scores: np.ndarray):
        self._experts, self._scores = experts, scores
        self._order = np.argsort(scores, kind="stable")
        self._next = 0

    def take(self, score: float) -> Slot | None:
        """Return a slot for an expert with this score; None if none is free now."""
        if self._next < len(self._order):
            position = int(self._order[self._next])
            if self._scores[position] < score:
                self._next += 1
                return self._experts.kept_slot(position)
        return self._experts.staging.take()
