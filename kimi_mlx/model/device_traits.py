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
"""Head sizes of that kernel."""

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


NUMPY_MIN_MULTIPLY_ADDS = 2**18
"""Minimum multiply-adds of a layer's latent attention for NumPy: below, evaluating its inputs (about 0.1 ms) costs more
than NumPy saves."""


def uses_numpy(kind: DeviceKind, platform: str, value_bytes: int, multiply_adds: int) -> bool:
    """Return whether NumPy computes attention in the latent space (kimi_mlx.model.numpy_attention).

    Args:
        kind: kind of the device.
        platform: sys.platform; MLX's wheel for Linux has the reference BLAS, that for macOS Apple's.
        value_bytes: bytes per value of the compute dtype; NumPy has no bfloat16.
        multiply_adds: multiply-adds of the scores and values of all queries of a layer.
    """
    is_slow = kind == "cpu" and platform == "linux"
    return is_slow and value_bytes == FLOAT32_BYTES and multiply_adds >= NUMPY_MIN_MULTIPLY_ADDS


def weighs_activations(kind: DeviceKind) -> bool:
    """Return whether the weights of experts are applied to their activations, in the kernel of SwiGLU.

    On a GPU that saves the kernels of the weights and of their sum. On a CPU nothing is fused.
    """
    return kind != "cpu"


@dataclass(frozen=True)
class Tuning:
    """Constants with an optimum that depends on the device. They change speed and memory, never the result.

    Args:
        stack_max_keys: maximum length of caches that are stacked, so that several sequences attend with one set of
            kernels instead of one set each.
        keeps_stacks: whether the caches of sequences that attend together stay stacked in memory between steps
            (kimi_mlx.model.cache.KeyStack). Each change of the batch copies them once.
        stack_padding: largest share by which the longest cache of a stack may exceed the shortest; MIN_PADDING tokens
            (kimi_mlx.model.batch_layout) are always allowed. The excess is computed and masked.
        sort_min_choices: minimum number of (token, expert) pairs that are sorted, so that each expert is read once.
        sort_min_per_expert: the same, per expert of the layer.
        prefill_chunk: number of prompt tokens per step: large enough to keep the hardware busy, small enough to show
            progress and to cancel quickly.
        max_sequences: maximum number of sequences that run at the same time, if their caches fit in memory; further
            ones wait. More sequences share each read of the weights, but every answer becomes slower.
        encode_multiply_adds: largest number of multiply-adds of a part of the encoding of images, so that it takes no
            longer than a chunk of a prompt while other sequences decode.
        weight_flops: operations per second in products with weights. The rates choose between attention in the latent
            space and by heads (kimi_mlx.model.attention_cost), and the size of chunks of prompts while other sequences
            decode (kimi_mlx.sizing.step_time).
        attention_flops: operations per second in attention by heads, softmax included.
        latent_flops: operations per second in attention in the latent space, softmax included.
        read_bytes_per_s: bytes of weights read per second.
    """

    stack_max_keys: int
    keeps_stacks: bool
    stack_padding: float
    sort_min_choices: int
    sort_min_per_expert: int
    prefill_chunk: int
    max_sequences: int
    encode_multiply_adds: int
    weight_flops: float
    attention_flops: float
    latent_flops: float
    read_bytes_per_s: float


CPU_TUNING = Tuning(
    stack_max_keys=512,  # a longer copy takes longer than the operations that it saves
    keeps_stacks=False,  # an operation costs microseconds, and NumPy attends sequence by sequence
    stack_padding=0.0,
    sort_min_choices=64,  # no difference from 64 to 2,560
    sort_min_per_expert=0,
    prefill_chunk=512,  # 1,024 and 2,048 are not faster
    max_sequences=128,
    encode_multiply_adds=3 * 10**8,  # 0.2 s
    weight_flops=3e9,  # 1.2 and 3.8 GMAC/s in MLX's 4-bit products, by layout
    attention_flops=4.5e9,  # 3 GMAC/s in the reference BLAS of MLX's wheel, 12 ns per exponential
    latent_flops=4e10,  # 20 to 30 GMAC/s in NumPy's OpenBLAS, 0.5 ns per exponential
    read_bytes_per_s=1e10,
)
"""Measured on Linux with two cores of an AMD EPYC (docs/benchmark.md)."""

METAL_TUNING = replace(
    CPU_TUNING,
    stack_max_keys=2**31,
    keeps_stacks=True,  # 16 sequences: 31 dispatches fewer per layer
    # MLX has a kernel for sorted pairs from 4 per expert on: 171 tokens of K2. Below, sorting only adds seven kernels.
    sort_min_per_expert=4,
    stack_padding=0.25,  # attention is 5 to 20 % of a decode step, so this wastes at most 5 %
    encode_multiply_adds=5 * 10**11,  # as long as a decode step of K2
    weight_flops=1.6e13,  # M3 Ultra, as in the planner
    attention_flops=1.6e13,
    latent_flops=1.4e13,  # scores are written to memory and read: 8 bytes besides 1,088 multiply-adds
    read_bytes_per_s=6.2e11,
)
"""Not measured yet: `kimi-mlx doctor --gpu` times the values for text and their neighbours. 10**12 operations take
about 50 ms on an M3 Ultra, as long as a decode step of K2."""

CUDA_TUNING = replace(METAL_TUNING, weight_flops=1e14, attention_flops=1e14, latent_flops=8e13, read_bytes_per_s=1.5e12)
"""Not measured yet; rates of a server GPU."""

TUNINGS: dict[DeviceKind, Tuning] = {"cpu": CPU_TUNING, "metal": METAL_TUNING, "cuda": CUDA_TUNING}
