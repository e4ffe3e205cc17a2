"""One run of the streaming benchmark in its own process: load a side, decode given tokens, print the results.

python -m scripts.streaming.worker JSON    (arguments: WorkerOptions)

The decoded tokens are given, not sampled: a random model would soon repeat itself, and then use the same experts only.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from kimi_mlx.files import write_atomically
from kimi_mlx.model.aligned_array import aligned_array, shared_view
from kimi_mlx.model.config import ModelConfig, load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.expert_streamer import ExpertStreamer
from kimi_mlx.model.expert_use import ExpertUse
from kimi_mlx.runtime.load import prepare_device
from kimi_mlx.store.experts import expert_sources
from kimi_mlx.store.stores import load_store, open_manifest
from kimi_mlx.weights.dequantize import MLX_TYPES
from kimi_mlx.weights.expert_reader import ExpertReader
from kimi_mlx.weights.streamed_experts import ExpertStreaming
from scripts.loading.rank import bytes_read, peak_memory, start_memory
from scripts.streaming.least_recent import LeastRecentlyUsed
from scripts.streaming.mapped import load_mapped

SideName = Literal["kimi-mlx", "plain LRU", "memory map", "resident", "disk", "learn"]

DISK_S = 2.0
"""Duration of the measurement of the disk."""

DISK_READS = 16
"""Number of experts that are requested at the same time: those of two layers of a token."""


@dataclass(frozen=True)
class WorkerOptions:
    """Options of a run.

    Args:
        side: side of the benchmark; `disk` measures random reads of experts, `learn` learns the use of experts.
        folder: folder of the placement.
        use: file with the use of experts.
        expert_memory: bytes for experts, of the sides that stream.
        warmup: number of tokens before the clock starts.
        tokens: number of timed tokens.
        seed: seed of the tokens.
    """

    side: SideName
    folder: str
    use: str
    expert_memory: int
    warmup: int
    tokens: int
    seed: int


@dataclass(frozen=True)
class WorkerResult:
    """Measurements of a run.

    Args:
        seconds: time of each timed token.
        cpu_seconds: processor time of all timed tokens, in all threads of the process.
        stats: counters of the streamer for these tokens; None for sides without one.
        disk_bytes: bytes that the process read from the disk meanwhile, as the system counts them; None without /proc.
        load_s: time to load.
        before_bytes: resident memory of the process before it loaded the model.
        peak_bytes: peak of the resident memory.
        allocated_bytes: bytes of the model's arrays and of the slots for experts.
        logits: digest of the logits of all timed tokens.
        disk_bytes_per_s: rate of the disk, of the side `disk`.
    """

    seconds: Sequence[float] = ()
    cpu_seconds: float = 0.0
    stats: dict[str, Any] | None = None
    disk_bytes: int | None = None
    load_s: float = 0.0
    before_bytes: int = 0
    peak_bytes: int = 0
    allocated_bytes: int = 0
    logits: str = ""
    disk_bytes_per_s: float = 0.0


def main() -> None:
    """Run the side that the argument names, and print the result as JSON."""
    options = WorkerOptions(**json.loads(sys.argv[1]))
    prepare_device()
    result = measure_disk(options) if options.side == "disk" else run_side(options)
    print(json.dumps(asdict(result)), flush=True)
    os._exit(0)  # without saving the use of experts: all repetitions start alike


def run_side(options: WorkerOptions) -> WorkerResult:
    """Load a side and decode."""
    folder = Path(options.folder)
    config = load_config(folder)
    warm_up_kernels()
    before_bytes = start_memory()
    began = time.perf_counter()
    model = open_side(options, config)
    load_s = time.perf_counter() - began
    tokens = np.random.default_rng([options.seed, options.side == "learn"]).integers(
        0, config.vocab_size, options.warmup + options.tokens
    )
    step = stepper(model)
    for token in tokens[: options.warmup]:
        step(int(token))
    counts_before, disk_before, cpu_before = model.expert_stats, bytes_read(), time.process_time()
    digest, seconds = hashlib.sha256(), list[float]()
    for token in tokens[options.warmup :]:
        began = time.perf_counter()
        logits = step(int(token))
        seconds.append(time.perf_counter() - began)
        digest.update(np.asarray(logits).tobytes())
    counts, disk, cpu = model.expert_stats, bytes_read(), time.process_time()
    if options.side == "learn":
        assert model.streamer is not None
        write_atomically(Path(options.use), model.streamer.use.to_bytes())
    difference = None
    if counts is not None and counts_before is not None:
        difference = asdict(counts.since(counts_before))
    return WorkerResult(
        seconds,
        cpu - cpu_before,
        difference,
        None if disk is None or disk_before is None else disk[1] - disk_before[1],
        load_s,
        before_bytes,
        peak_memory(),
        mx.get_active_memory(),
        digest.hexdigest(),
    )


def stepper(model: Model) -> Callable[[int], mx.array]:
    """Return a function that appends a token to one sequence, and returns its evaluated logits."""
    cache = model.make_cache()

    def step(token: int) -> mx.array:
        logits = model(mx.array([[token]]), cache)
        mx.eval(logits)
        return logits

    return step


def warm_up_kernels() -> None:
    """Compute a little, so that MLX's threads and libraries are in memory before the memory is measured."""
    weight, scales, biases = mx.quantize(mx.random.normal((8, 64, 64)))
    indices = mx.array([0], mx.uint32)
    mx.eval(mx.gather_qmm(mx.ones((1, 1, 64)), weight, scales, biases, rhs_indices=indices) @ mx.ones((64, 64)))


def open_side(options: WorkerOptions, config: ModelConfig) -> Model:
    """Load the model of a side."""
    folder = Path(options.folder)
    manifest = open_manifest(folder, 0, 1, "hybrid")
    if options.side == "memory map":
        return load_mapped(folder, manifest, config, mx.float32)
    if options.side == "resident":
        return load_store(folder, manifest, config, mx.float32)
    reader = ExpertReader(expert_sources(folder, manifest), "F32")
    use_file = Path(options.use)

    def load_use(use: ExpertUse) -> None:
        if options.side != "learn":
            use.update_from_bytes(use_file.read_bytes())

    kind = _LeastRecentStreaming if options.side == "plain LRU" else ExpertStreaming
    streaming = kind(reader, options.expert_memory, mx.float32, load_use)
    return load_store(folder, manifest, config, mx.float32, streaming=streaming)


class _LeastRecentStreaming(ExpertStreaming):
    """Streaming with plain LRU."""

    def streamer(self, config: ModelConfig) -> ExpertStreamer:
        """Return the streamer of a model with these experts."""
        streamer = super().streamer(config)
        streamer.use = LeastRecentlyUsed(streamer.use, config.num_experts_per_tok)
        return streamer


def measure_disk(options: WorkerOptions) -> WorkerResult:
    """Read random experts for DISK_S, bypassing the page cache, with the reader of the streamer."""
    folder = Path(options.folder)
    sources = expert_sources(folder, open_manifest(folder, 0, 1, "hybrid"))
    reader = ExpertReader(sources, "F32")
    layer = sources[0].layer
    stacks = [aligned_array((DISK_READS, *array.shape), MLX_TYPES[array.dtype]) for array in reader.arrays(layer)]
    slots = [[shared_view(stack)[index] for stack in stacks] for index in range(DISK_READS)]
    random = np.random.default_rng(options.seed)

    def request(slot: int) -> tuple[int, Any]:
        source = sources[random.integers(len(sources))]
        return slot, reader.read(source.layer, int(random.integers(source.num_experts)), slots[slot])

    began = time.perf_counter()
    reads = [request(slot) for slot in range(DISK_READS)]
    while time.perf_counter() - began < DISK_S:
        slot, read = reads.pop(0)
        read.result()
        reads.append(request(slot))
    for _, read in reads:
        read.result()
    seconds = time.perf_counter() - began
    return WorkerResult(disk_bytes_per_s=reader.bytes_read / seconds)


if __name__ == "__main__":
    main()
