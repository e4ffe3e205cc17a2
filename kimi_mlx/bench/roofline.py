"""Roofline of decode: the token rate if only memory bandwidth mattered."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from kimi_mlx.bench.measure import Case
from kimi_mlx.cluster.hosts.machine import local_machine
from kimi_mlx.errors import UsageError
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.planner.machines import machine_of_host
from kimi_mlx.planner.memory import bytes_per_token
from kimi_mlx.planner.model_shape import ModelShape, shape_of_config
from kimi_mlx.sizing.kv_cache import BFLOAT16_BYTES, kv_bytes_per_token

COPY_BYTES = 256 << 20
COPIES = 5


@dataclass(frozen=True)
class Bandwidth:
    """Memory bandwidth.

    Args:
        bytes_per_s: bandwidth.
        source: source of the number.
    """

    bytes_per_s: float
    source: str


def memory_bandwidth() -> Bandwidth:
    """Return the bandwidth of this Mac's chip from the planner's table, else a measurement."""
    machine = local_machine()
    try:
        chip = machine_of_host("this machine", machine.chip, machine.memory_bytes, None).chip
    except UsageError:
        return measured_bandwidth()
    return Bandwidth(chip.bandwidth_bytes_per_s, f"{chip.chip}, as published")


def measured_bandwidth() -> Bandwidth:
    """Return the best of several copies in one thread; bytes read and written are counted."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.empty(COPY_BYTES, np.uint8)
    seconds: list[float] = []
    for _ in range(COPIES):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    name = f"measured here: one thread copies {COPY_BYTES >> 20} MiB, read + written"
    return Bandwidth(2 * COPY_BYTES / min(seconds), name)


@dataclass(frozen=True)
class Roofline:
    """Roofline of a model on this machine. Local ranks share its memory, so they count as one.

    Args:
        shape: the model in its compute dtype.
        bandwidth: memory bandwidth.
        generation_tokens: number of new tokens per answer.
    """

    shape: ModelShape
    bandwidth: Bandwidth
    generation_tokens: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: str, generation_tokens: int) -> Roofline:
        """Return the roofline for a configuration; measure the bandwidth if it is not known."""
        return cls(shape_of_config("", replace(config, dtype=dtype)), memory_bandwidth(), generation_tokens)

    def bytes_per_token(self, case: Case) -> float:
        """Return the bytes that an answer's middle token reads: weights, chosen experts, and the cache so far."""
        context = case.depth + case.prompt_tokens + self.generation_tokens // 2
        value_bytes = 4 if self.shape.config.dtype == "float32" else BFLOAT16_BYTES
        cache = context * kv_bytes_per_token(self.shape.config, value_bytes=value_bytes)
        return bytes_per_token(self.shape, 0) + cache

    def share(self, case: Case, decode_tok_per_s: float) -> float | None:
        """Return the share of the bandwidth that decode uses; None for several requests, which share reads."""
        if case.concurrency > 1:
            return None
        return self.bytes_per_token(case) * decode_tok_per_s / self.bandwidth.bytes_per_s

    def to_dict(self) -> dict[str, Any]:
        """Return the roofline for JSON."""
        return {**asdict(self.bandwidth), "weights_bytes_per_token": round(bytes_per_token(self.shape, 0))}
