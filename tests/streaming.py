"""Models whose routed experts are streamed: from memory, with delays and errors on request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.aligned_array import shared_view
from kimi_mlx.model.config import ModelConfig, load_config
from kimi_mlx.model.decoder import Communicator, Model
from kimi_mlx.model.expert_budget import min_expert_bytes
from kimi_mlx.model.expert_format import ExpertFormat, MatrixFormat, RoutedExperts
from kimi_mlx.model.expert_streamer import ExpertStreamer, streamed_layers
from kimi_mlx.model.expert_use import ExpertUse
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Weight
from kimi_mlx.parallel.placement import RankShare
from kimi_mlx.weights.assemble import load_layer
from kimi_mlx.weights.layer_plan import plan_layer, plan_top
from kimi_mlx.weights.reader import open_checkpoint

STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class MemoryRead:
    """A read of a MemoryReader."""

    def __init__(self, future: Future[None]):
        self._future = future

    @property
    def is_done(self) -> bool:
        """Whether the read has ended."""
        return self._future.done()

    def cancel(self) -> bool:
        """Cancel the read if it has not begun."""
        return self._future.cancel()

    def promote(self) -> None:
        """Do nothing: all reads have one priority."""

    def result(self) -> None:
        """Wait for the end."""
        try:
            self._future.result(timeout=60)
        except CancelledError:
            raise WeightsError("the reader of experts is closed") from None


class MemoryReader:
    """Reads experts from memory, in the order of the requests.

    Args:
        num_threads: number of reads at the same time.
    """

    def __init__(self, num_threads: int = 4):
        self._experts: dict[tuple[int, int], list[np.ndarray]] = {}
        self._threads = ThreadPoolExecutor(num_threads)
        self.delay_s: Callable[[int, int], float] = lambda layer, expert: 0.0
        """Duration of the read of an expert, by layer and expert."""
        self.broken: set[tuple[int, int]] = set()
        """Experts that cannot be read, as (layer, expert)."""
        self.read_experts: list[tuple[int, int]] = []
        """Experts that were read, in the order of the ends."""
        self.is_closed = False
        self._lock = threading.Lock()

    def add(self, layer: int, first: int, stacks: Sequence[mx.array]) -> None:
        """Add the experts of a layer from the stack of each array."""
        for stack in stacks:
            for expert, array in enumerate(shared_view(stack), first):
                self._experts.setdefault((layer, expert), []).append(array.copy())

    def read(self, layer: int, expert: int, destination: Sequence[np.ndarray], is_guess: bool = False) -> MemoryRead:
        """Request a read."""
        future: Future[None] = Future()
        if self.is_closed:
            future.set_exception(WeightsError("the reader of experts is closed"))
        else:
            future = self._threads.submit(self._read, layer, expert, destination)
        return MemoryRead(future)

    def close(self) -> None:
        """Cancel waiting reads and wait for the others."""
        self.is_closed = True
        self._threads.shutdown(cancel_futures=True)

    def _read(self, layer: int, expert: int, destination: Sequence[np.ndarray]) -> None:
        delay_s = self.delay_s(layer, expert)
        if delay_s:
            for array in destination:  # for a step that does not wait
                array.view(np.uint8)[:] = 0x55
            time.sleep(delay_s)
        if (layer, expert) in self.broken:
            raise WeightsError(f"expert {expert} of layer {layer} cannot be read")
        for target, source in zip(destination, self._experts[layer, expert], strict=True):
            target[:] = source
        with self._lock:
            self.read_experts.append((layer, expert))


def load_weights(
    folder: Path, dtype: mx.Dtype = mx.float32, share: RankShare | None = None
) -> tuple[ModelConfig, LayerWeights, list[LayerWeights]]:
    """Return the configuration, the top and the layers of a checkpoint, or of a rank's share of it."""
    config = load_config(folder)
    reader = open_checkpoint(folder, config)
    layers = [
        load_layer(reader, plan_layer(reader.checkpoint, layer, share), dtype)
        for layer in range(config.num_hidden_layers)
    ]
    return config, load_layer(reader, plan_top(reader.checkpoint, share), dtype), layers


def split_experts(weights: LayerWeights, layer: int, reader: MemoryReader) -> LayerWeights:
    """Move the routed experts of a layer to a reader; layers without experts are unchanged."""
    if not weights.has(STACKS[0]):
        return weights
    gate_up, (down,) = weights.matrices(STACKS[0]), weights.matrices(STACKS[1])
    parts = [*gate_up, down]
    num_routed = down.weight.shape[0] - weights.num_fused_shared
    expert_format = ExpertFormat(tuple(map(MatrixFormat.of, gate_up)), MatrixFormat.of(down))
    stacks = [array[:num_routed] for part in parts for array in part.arrays]
    mx.eval(stacks)
    reader.add(layer, weights.first_expert, stacks)
    entries = {name: parts for name, parts in weights.entries.items() if name not in STACKS}
    if weights.num_fused_shared:
        entries |= {name: [_tail(part, num_routed) for part in weights.matrices(name)] for name in STACKS}
    return replace(weights, entries=entries, routed=RoutedExperts(expert_format, num_routed, expert_format.num_bytes))


def streamed_model(
    weights: tuple[ModelConfig, LayerWeights, list[LayerWeights]],
    budget: float | str,
    reader: MemoryReader | None = None,
    communicator: Communicator | None = None,
    use: ExpertUse | None = None,
    fills: bool = True,
) -> tuple[Model, MemoryReader]:
    """Return a model with streamed experts, and its reader.

    Args:
        weights: configuration, top and layers, from `load_weights`.
        budget: share of the experts that are kept, 0 to 1; or `one` for one expert of one layer.
        reader: reader without experts; None for a new one.
        communicator: communicator of the rank.
        use: use of the experts.
        fills: whether slots are filled at the start.
    """
    config, top, layers = weights
    reader = reader or MemoryReader()
    split = [split_experts(each, layer, reader) for layer, each in enumerate(layers)]
    routed = {layer: each.routed for layer, each in enumerate(split) if each.routed is not None}
    streamed = streamed_layers(routed)
    total = sum(layer.num_experts * layer.expert_bytes for layer in streamed)
    kept = streamed[0].expert_bytes if budget == "one" else int(float(budget) * total)
    staged = min_expert_bytes(streamed, config.num_experts_per_tok)
    first = next(each.first_expert for each in split if each.routed is not None)
    streamer = ExpertStreamer(reader, routed, first, staged + kept, config.num_experts_per_tok, use)
    model = Model(config, top, split, communicator, streamer=streamer)
    if fills:
        list(streamer.fill())
    return model, reader


def _tail(part: Weight, start: int) -> Weight:
    arrays = [mx.contiguous(array[start:]) for array in part.arrays]
    mx.eval(arrays)
    return Weight(*arrays, quantization=part.quantization, dtype=part.dtype)
