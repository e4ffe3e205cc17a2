"""The roofline of decode: how many tokens a second the memory could feed, were there nothing but reading."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from kimi_mlx.bench.measure import Case
from kimi_mlx.cluster.hosts.machine import this_machine
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
    """Of the memory.

    Args:
        bytes_per_s: how fast.
        source: how we know.
    """

    bytes_per_s: float
    source: str


def memory_bandwidth() -> Bandwidth:
    """Of this Mac's chip by the planner's table, else measured."""
    machine = this_machine()
    try:
        chip = machine_of_host("this machine", machine.chip, machine.memory_bytes, None).chip
    except UsageError:
        return measured_bandwidth()
    return Bandwidth(chip.bandwidth_bytes_per_s, f"of the {chip.chip} by its maker")


def measured_bandwidth() -> Bandwidth:
    """The best of several copies in one thread of this process, bytes read and written."""
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
    """Of a model on this machine; ranks here share its memory, so that they count as one.

    Args:
        shape: of the model, in the type that is computed in.
        bandwidth: of the memory.
        generation_tokens: of each answer.
    """

    shape: ModelShape
    bandwidth: Bandwidth
    generation_tokens: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: str, generation_tokens: int) -> Roofline:
        """Measure the memory where its bandwidth is not known, and take sizes from the configuration."""
        return cls(shape_of_config("", replace(config, dtype=dtype)), memory_bandwidth(), generation_tokens)

    def bytes_per_token(self, case: Case) -> float:
        """What the middle token of an answer must read: weights, chosen experts, and the cache until there."""
        context = case.depth + case.prompt_tokens + self.generation_tokens // 2
        value_bytes = 4 if self.shape.config.dtype == "float32" else BFLOAT16_BYTES
        cache = context * kv_bytes_per_token(self.shape.config, value_bytes=value_bytes)
        return bytes_per_token(self.shape, 0) + cache

    def share(self, case: Case, decode_tok_per_s: float) -> float | None:
        """How much of the bandwidth decode uses; None for several requests, which share what they read."""
        if case.concurrency > 1:
            return None
        return self.bytes_per_token(case) * decode_tok_per_s / self.bandwidth.bytes_per_s

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self.bandwidth), "weights_bytes_per_token": round(bytes_per_token(self.shape, 0))}
