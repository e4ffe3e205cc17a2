"""Stream the routed experts of a rank from disk, if they do not all fit in memory.

Each layer has slots for the experts that it keeps. A staging area, shared by the layers, takes those that get no slot.
A layer's experts are computed in waves: first those in memory, then the others as their reads end. After these reads,
those experts are prefetched that the next layer's router would choose for the same states (guesses). No slot is written
while a computation may read it: `Slot.begin_read` checks this.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import EngineError, WeightsError
from kimi_mlx.model.expert_budget import StreamedLayer, divide_slots
from kimi_mlx.model.expert_format import ExpertFormat, RoutedExperts
from kimi_mlx.model.expert_slots import Launch, SlotReader, SlotStack, StagingArea
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.model.expert_use import ExpertUse
from kimi_mlx.model.layer_experts import LayerExperts, SlotAllocator

NUM_WAVES = 4
"""Number of waves that fit in the staging area, so that some are computed while others are read."""

SAVE_EVERY_S = 300.0
"""Time between two calls of `save_use`."""

GUESS_PRIOR = (6, 10)
"""Number of correct guesses and of all guesses that are assumed at the start."""


@dataclass
class Wave:
    """Experts of a layer that are in memory, to be computed now.

    Args:
        stack: stack of arrays that has them.
        slots: index in the stack of each expert, numbered from the first on this rank.
    """

    stack: SlotStack
    slots: Mapping[int, int]
    launch: Launch | None = field(default=None, init=False)
    """Computation on the wave; the caller sets it before it takes the next wave."""


class ExpertStreamer:
    """The routed experts of all layers of a rank.

    Args:
        reader: reader of experts; `close` closes it.
        routed: routed experts by number of the layer, in ascending order.
        first_expert: number of the first routed expert on this rank.
        num_bytes: memory for experts: slots and staging area.
        experts_per_token: number of routed experts that a token chooses.
        use: statistics of the use of the experts; None to start without any.
        save_use: function that saves `use`; called every SAVE_EVERY_S during steps, and by `close`.
    """

    def __init__(
        self,
        reader: SlotReader,
        routed: Mapping[int, RoutedExperts],
        first_expert: int,
        num_bytes: int,
        experts_per_token: int,
        use: ExpertUse | None = None,
        save_use: Callable[[ExpertUse], None] = lambda use: None,
    ):
        counts = [experts.num_experts for experts in routed.values()]
        sizes = [experts.stored_bytes for experts in routed.values()]
        self.use = use or ExpertUse(list(routed), counts, experts_per_token)
        self.plan = divide_slots(num_bytes, streamed_layers(routed), experts_per_token, self.use.rates())
        self._reader, self._routed, self._first, self._save_use = reader, routed, first_expert, save_use
        self._saved_at = time.monotonic()
        self._staging: dict[ExpertFormat, StagingArea] = {}
        self._layers: list[LayerExperts] = []
        self._launches: list[Launch] = []
        self._is_in_step = self._is_interrupted = False
        self._fill_bytes = 0
        self._stats = ExpertStats(
            kept_experts=sum(self.plan.kept),
            num_experts=sum(counts),
            expert_bytes=int(np.average(sizes, weights=counts)),
        )

    @property
    def stats(self) -> ExpertStats:
        """Counters so far. Safe from any thread."""
        stats = self._stats.copy()
        stats.bytes_read = self._bytes_read() - self._fill_bytes
        return stats

    @property
    def layers(self) -> Sequence[LayerExperts]:
        """The layers, in their order."""
        return self._layers

    def add_layer(self, layer: int, shared: Sequence[mx.array]) -> LayerExperts:
        """Allocate the slots of a layer; call it in the order of the layers.

        Args:
            layer: number of the layer.
            shared: stacks of the shared experts that are computed like routed ones, one for each array of the format.
        """
        routed, index = self._routed[layer], len(self._layers)
        if routed.format not in self._staging:
            self._staging[routed.format] = StagingArea(routed.format, self.plan.staging)
        staging, num_kept = self._staging[routed.format], self.plan.kept[index]
        experts = LayerExperts(index, layer, routed, self._first, shared, num_kept, staging, self._reader)
        self._layers.append(experts)
        return experts

    def next_layer(self, experts: LayerExperts) -> LayerExperts | None:
        """Return the next layer with routed experts on this rank; None after the last one."""
        return self._layers[experts.index + 1] if experts.index + 1 < len(self._layers) else None

    def fill(self) -> Iterator[int]:
        """Read the most used experts into the slots, in the order of the disk, up to one layer ahead.

        Yields:
            The number of each layer whose slots are filled.

        Raises:
            WeightsError: an expert cannot be read.
        """
        reading: deque[tuple[LayerExperts, list[int]]] = deque()
        for experts in self._layers:
            popular = np.argsort(-self.use.scores(experts.index), kind="stable")[: experts.num_kept]
            chosen: list[int] = np.sort(popular).tolist()
            for position, expert in enumerate(chosen):
                experts.begin_read(expert, experts.kept_slot(position))
            reading.append((experts, chosen))
            if len(reading) > 1:
                yield _finish_fill(*reading.popleft())
        while reading:
            yield _finish_fill(*reading.popleft())
        self._fill_bytes = self._bytes_read()

    def markers(self) -> list[mx.array]:
        """Return arrays that are ready when all launched computations have ended. Evaluate them before `waves`."""
        return [launch.marker for launch in self._launches if launch.marker is not None]

    def waves(
        self, experts: LayerExperts, needed: np.ndarray, counts: np.ndarray, num_tokens: int, guess: np.ndarray
    ) -> Iterator[Wave]:
        """Yield the experts that a layer needs in a step, each in one wave, and the shared ones in the first.

        Args:
            experts: the layer.
            needed: needed routed experts of this rank, ascending, numbered from the first on this rank.
            counts: number of tokens that need each of them.
            num_tokens: number of tokens of the step.
            guess: experts to prefetch for the next layer, the likeliest first; may be empty.

        Raises:
            WeightsError: an expert cannot be read.
            EngineError: the model was closed during the step.
        """
        self._begin(experts)
        num_right, num_cancelled = experts.check_guesses(set(needed.tolist()))
        self.use.observe(experts.index, needed, counts, num_tokens)
        step = _LayerStep(self, experts, needed.tolist(), guess.tolist())
        stats = self._stats
        stats.guesses_right += num_right
        stats.guesses_cancelled += num_cancelled
        stats.misses += len(step.missing) + num_right
        stats.hits += len(needed) - len(step.missing) - num_right
        try:
            for wave in step.waves():
                yield wave
                assert wave.launch is not None
                self._launches.append(wave.launch)
        except WeightsError:
            self._check_open()
            raise
        self._is_in_step = False

    def finish_read(self, experts: LayerExperts, expert: int) -> None:
        """Wait for a read, and add the time to wait_seconds.

        Raises:
            WeightsError: the expert could not be read.
        """
        began = time.perf_counter()
        experts.finish_read(expert)
        self._stats.wait_seconds += time.perf_counter() - began

    def count_guess(self) -> None:
        """Count a guess."""
        self._stats.guesses += 1

    @property
    def guess_chance(self) -> float:
        """Share of the guesses so far that were correct."""
        right, total = GUESS_PRIOR
        return (self._stats.guesses_right + right) / (self._stats.guesses + total)

    def interrupt(self) -> None:
        """Make the current step and all later ones fail, and end all reads. Safe from any thread."""
        self._is_interrupted = True
        self._reader.close()

    def close(self) -> None:
        """End all reads, close the files and save the statistics. The model is unusable afterwards."""
        self.interrupt()
        if self.use.has_changed:
            self._save_use(self.use)

    def _begin(self, experts: LayerExperts) -> None:
        """Begin a layer of a step. All launched computations have ended."""
        self._check_open()
        for launch in self._launches:
            launch.on_evaluated()
        self._launches.clear()
        if self._is_in_step:
            self._discard()
        self._is_in_step = True
        if experts.index == 0:
            self._stats.steps += 1
            if time.monotonic() - self._saved_at > SAVE_EVERY_S:
                self._save_use(self.use)
                self._saved_at = time.monotonic()

    def _check_open(self) -> None:
        if self._is_interrupted:
            raise EngineError("the model was closed during a step")

    def _discard(self) -> None:
        """Release what a failed step has left behind."""
        mx.synchronize()  # the step may have launched a computation without a marker
        for experts in self._layers:
            self._stats.guesses_cancelled += experts.discard()

    def _bytes_read(self) -> int:
        return sum(experts.num_reads * experts.stored_bytes for experts in self._layers)


class _LayerStep:
    """The experts of one layer in a step.

    Args:
        streamer: the experts of all layers.
        experts: the layer.
        needed: needed experts.
        guess: experts to prefetch for the next layer.
    """

    def __init__(self, streamer: ExpertStreamer, experts: LayerExperts, needed: list[int], guess: list[int]):
        self._streamer, self._experts, self._staging = streamer, experts, experts.staging
        self._needed, self._next = needed, streamer.next_layer(experts)
        self._all_guesses, self._guesses = guess, deque(guess)
        self.missing = deque(expert for expert in needed if expert not in experts)
        present = [expert for expert in needed if expert in experts]
        self._ready = [expert for expert in present if experts.slot(expert).read is None]
        self._reading = [expert for expert in present if experts.slot(expert).read is not None]

    def waves(self) -> Iterator[Wave]:
        """Yield all waves."""
        self._start_reads()
        yield from self._launch(self._ready, self._experts.shared_slots)
        while self._reading or self.missing:
            self._start_guesses()
            self._make_space()
            yield from self._launch(self._finish_reads(), {})
            self._start_reads()
        self._start_guesses()
        while self._guesses and self._staging.wait_for_launch():
            self._start_guesses()

    def _launch(self, experts: list[int], shared: Mapping[int, int]) -> Iterator[Wave]:
        """Yield experts as one wave for each stack that they are in, and release their slots."""
        kept, staged = dict(shared), dict[int, int]()
        for expert in experts:
            slot = self._experts.slot(expert)
            (kept if self._experts.is_kept(slot) else staged)[expert] = slot.index
        for stack, slots in ((self._experts.stack, kept), (self._staging.stack, staged)):
            if not slots:
                continue
            assert stack is not None
            wave = Wave(stack, slots)
            yield wave
            for expert in slots.keys() - shared.keys():
                self._experts.slot(expert).launch = wave.launch
                self._experts.release(expert)

    def _start_reads(self) -> None:
        """Request reads of missing experts while there are slots for them."""
        while self.missing:
            slot = self._slots.take(self._scores[self.missing[0]])
            if slot is None:
                return
            expert = self.missing.popleft()
            self._experts.begin_read(expert, slot)
            self._reading.append(expert)

    def _make_space(self) -> None:
        """Wait for computations on the staging area if too few reads are under way to keep the disk busy."""
        while self.missing and len(self._reading) <= self._staging.num_slots // 2:
            if not self._staging.wait_for_launch():
                break
            self._start_reads()
        while self.missing and not self._reading:
            is_waiting = self._staging.wait_for_read()
            self._start_reads()
            assert is_waiting or self._reading, "no slot of the staging area is free"

    def _finish_reads(self) -> list[int]:
        """Wait for enough reads for a wave; return the experts of all reads that have ended."""
        fewest = max(1, min(len(self._reading), self._staging.num_slots) // NUM_WAVES)
        ended = self._reading[:fewest]
        for expert in ended:
            self._streamer.finish_read(self._experts, expert)
        for expert in self._reading[fewest:]:
            read = self._experts.slot(expert).read
            if read is not None and read.is_done:
                self._streamer.finish_read(self._experts, expert)
                ended.append(expert)
        self._reading = [expert for expert in self._reading if expert not in ended]
        return ended

    def _start_guesses(self) -> None:
        """Request reads for the next layer once all reads of this layer are requested."""
        if self._next is None or self.missing:
            return
        while self._guesses:
            if self._guesses[0] in self._next:
                self._guesses.popleft()
                continue
            slot = self._guess_slots.take(self._guess_scores[self._guesses[0]])
            if slot is None:
                return
            self._next.begin_read(self._guesses.popleft(), slot, is_guess=True)
            self._streamer.count_guess()

    @cached_property
    def _scores(self) -> np.ndarray:
        return self._streamer.use.scores(self._experts.index)

    @cached_property
    def _slots(self) -> SlotAllocator:
        return self._experts.slot_allocator(self._scores, self._needed)

    @cached_property
    def _guess_scores(self) -> np.ndarray:
        assert self._next is not None
        use = self._streamer.use
        return use.scores(self._next.index) + self._streamer.guess_chance * use.repeat_chance

    @cached_property
    def _guess_slots(self) -> SlotAllocator:
        assert self._next is not None
        return self._next.slot_allocator(self._streamer.use.scores(self._next.index), self._all_guesses)


def streamed_layers(routed: Mapping[int, RoutedExperts]) -> list[StreamedLayer]:
    """Return the layers for divide_slots.

    Args:
        routed: routed experts by number of the layer.
    """
    return [StreamedLayer(experts.num_experts, experts.format.num_bytes, experts.format) for experts in routed.values()]


def _finish_fill(experts: LayerExperts, chosen: list[int]) -> int:
    for expert in chosen:
        experts.finish_read(expert)
    return experts.layer
