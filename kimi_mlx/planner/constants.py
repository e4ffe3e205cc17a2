"""Constants of the predictions: three fitted ones, and published ones.

`python -m kimi_mlx.planner.fit` fits the three again, on the rows of `backtest.json` that are marked for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kimi_mlx.sizing.prefill import PREFILL_CHUNK

FENCE_S = 180e-6
"""Time of a collective in addition to the network: from the GPU to the CPU's stream and back.

Source: gh:ml-explore/mlx#4438 (M3 Ultra, mlx 0.32.2)."""

FAST_FENCE_S = 4e-6
"""The same with MLX_METAL_FAST_SYNCH=1, which can hang the GPU (same source; gh:ml-explore/mlx#3142)."""


@dataclass(frozen=True)
class Constants:
    """The fitted constants.

    Args:
        bandwidth_share: fraction of a chip's peak bandwidth that reading weights reaches.
        kernel_s: time between a kernel and the next one that depends on it.
        compute_share: fraction of a chip's peak fp16 rate that matrix multiplications and attention reach.
    """

    bandwidth_share: float
    kernel_s: float
    compute_share: float


FITTED = Constants(bandwidth_share=0.76, kernel_s=4.4e-6, compute_share=0.575)


@dataclass(frozen=True)
class EngineProfile:
    """Properties of an inference program.

    Args:
        name: name of the program.
        kernels_per_layer: number of kernels per layer in decode.
        prefill_chunk: number of prompt tokens per step.
        slices_head: whether ranks split the rows of the vocabulary.
        gathers: whether small all-reduces are computed as an all-gather and a local sum.
        returns_states: whether the last stage of a pipeline sends the hidden states back to the first, which has the
            head; if not, the last stage has the head and sends the token.
        overlaps_chunks: whether a pipeline stage starts a prompt's next chunk while later stages process this one.
        divides_queries: whether ranks that have all attention heads divide the queries of a chunk where it saves time.
    """

    name: str
    kernels_per_layer: int
    prefill_chunk: int
    slices_head: bool
    gathers: bool
    returns_states: bool
    overlaps_chunks: bool
    divides_queries: bool


KIMI_MLX = EngineProfile(
    "kimi-mlx",
    27,
    PREFILL_CHUNK,
    slices_head=True,
    gathers=True,
    returns_states=True,
    overlaps_chunks=True,
    divides_queries=True,
)
"""27 kernels in bfloat16: counted on the graph, docs/correctness.md."""

MLX_LM = EngineProfile(
    "mlx-lm",
    44,
    2048,
    slices_head=False,
    gathers=False,
    returns_states=False,
    overlaps_chunks=False,
    divides_queries=False,
)
"""44 kernels: counted on the graph, docs/correctness.md. exo and mlx-engine run the model of mlx-lm."""

ENGINE_PROFILES = {engine.name: engine for engine in (KIMI_MLX, MLX_LM)}

Strategy = Literal["single", "pipeline", "tensor", "hybrid", "expert"]
