"""Properties of each kind of device: its attention kernels, and constants whose best value depends on it.

Does not import MLX; kimi_mlx.model.device says which kind is in use.
Source of the kernels: `has_fused_kernel` in scaled_dot_product_attention.cpp of MLX's Metal and CUDA backends (0.32).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

DeviceKind = Literal["metal", "cuda", "cpu"]

METAL_WIDTHS = frozenset({64, 72, 80, 96, 128, 192, 256})
"""Head sizes of Metal's attention kernel for more than METAL_FEW_QUERIES queries."""

METAL_FEW_QUERIES = 8
"""Up to this many queries MLX takes its vector kernel, which lacks the widths 72 and 80."""

METAL_VECTOR_WIDTHS = METAL_WIDTHS - {72, 80}

METAL_MAX_FLOAT32_WIDTH = 128
"""Largest head size in float32: width 192 needs 40,448 bytes of threadgroup memory, and there are 32,768."""

CUDA_MAX_WIDTH = 128
"""Largest head size of cuDNN's attention as MLX calls it; sizes are multiples of 8."""

HALF_BYTES, FLOAT32_BYTES = 2, 4


def has_fused_attention(kind: DeviceKind, value_bytes: int, q_dim: int, v_dim: int, num_queries: int) -> bool:
    """Return whether MLX has a kernel that does not store the scores, for values padded to the width of the queries.

    Args:
        kind: kind of the device.
        value_bytes: bytes per value of the compute dtype.
        q_dim: size of a query and key head.
        v_dim: size of a value head.
        num_queries: number of queries of a sequence.
    """
    if v_dim > q_dim:
        return False
    if kind == "metal":
        widths = METAL_WIDTHS if num_queries > METAL_FEW_QUERIES else METAL_VECTOR_WIDTHS
        return q_dim in widths and (value_bytes == HALF_BYTES or q_dim <= METAL_MAX_FLOAT32_WIDTH)
    if kind == "cuda":  # on GPUs since Ampere (compute capability 8)
        return value_bytes == HALF_BYTES and q_dim % 8 == 0 and q_dim <= CUDA_MAX_WIDTH and num_queries > 1
    return False


ABSORB_ALWAYS = 8
"""Up to this many new tokens attend in the latent space on a context of any length."""

ABSORB_MIN_KEYS = 4
"""Cached tokens per query from which on more than ABSORB_ALWAYS queries attend in the latent space."""


@dataclass(frozen=True)
class Tuning:
    """Constants with an optimum that depends on the device. They change speed and memory, never the result.

    Args:
        absorb_max_queries: maximum number of new tokens that attend in the latent space. A query there costs
            2 * kv_lora_rank + qk_rope_head_dim multiplications per key and head (K2: 1,088) instead of 320, but the
            keys are not expanded into heads, which costs 131,072 per key. On a long context that pays up to about 170
            queries.
        stack_max_keys: maximum length of caches that are stacked in a copy, so that several sequences attend with one
            set of kernels instead of one set each.
        sort_min_choices: minimum number of (token, expert) pairs that are sorted, so that each expert is read once.
        prefill_chunk: number of prompt tokens per step: large enough to keep the hardware busy, small enough to show
            progress and to cancel quickly.
        max_sequences: maximum number of sequences that run at the same time, if their caches fit in memory; further
            ones wait. More sequences share each read of the weights, but every answer becomes slower.
        encode_multiply_adds: largest number of multiply-adds of a part of the encoding of images, so that it takes no
            longer than a chunk of a prompt beside decoding.
        weight_flops: operations per second in products with weights. The three rates only determine the size of
            chunks of prompts beside decoding (kimi_mlx.sizing.step_time).
        attention_flops: operations per second in attention.
        read_bytes_per_s: bytes of weights read per second.
    """

    absorb_max_queries: int
    stack_max_keys: int
    sort_min_choices: int
    prefill_chunk: int
    max_sequences: int
    encode_multiply_adds: int
    weight_flops: float
    attention_flops: float
    read_bytes_per_s: float

    def absorbs(self, offset: int, length: int) -> bool:
        """Return whether `length` new tokens after `offset` cached ones attend in the latent space."""
        return length <= min(self.absorb_max_queries, max(ABSORB_ALWAYS, offset // ABSORB_MIN_KEYS))


CPU_TUNING = Tuning(
    absorb_max_queries=64,
    stack_max_keys=512,
    sort_min_choices=64,
    prefill_chunk=512,
    max_sequences=128,
    encode_multiply_adds=3 * 10**8,
    weight_flops=3e9,
    attention_flops=4.5e9,
    read_bytes_per_s=1e10,
)
"""Measured on Linux with two cores (docs/benchmark.md)."""

METAL_TUNING = replace(
    CPU_TUNING,
    absorb_max_queries=128,
    encode_multiply_adds=5 * 10**11,
    weight_flops=1.6e13,
    attention_flops=1.6e13,
    read_bytes_per_s=6.2e11,
)
"""Not measured yet: `kimi-mlx doctor --gpu` times the neighbours of the values for text. 10**12 operations take about
50 ms on an M3 Ultra, as long as a decode step of K2. The rates are those of an M3 Ultra in the planner."""

CUDA_TUNING = replace(METAL_TUNING, weight_flops=1e14, attention_flops=1e14, read_bytes_per_s=1.5e12)
"""Not measured yet; rates of a GPU for servers."""

TUNINGS: dict[DeviceKind, Tuning] = {"cpu": CPU_TUNING, "metal": METAL_TUNING, "cuda": CUDA_TUNING}
