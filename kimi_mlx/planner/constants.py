"""What the predictions rest on beside the tables: three fitted constants, and published ones.

`python -m kimi_mlx.planner.fit` fits the former again, on the rows of `backtest.json` that say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kimi_mlx.sizing.prefill import PREFILL_CHUNK

FENCE_S = 180e-6
"""From the GPU to the CPU's stream and back for a collective (gh:ml-explore/mlx#4438: M3 Ultra, mlx 0.32.2)."""

FAST_FENCE_S = 4e-6
"""The same with MLX_METAL_FAST_SYNCH=1, which can wedge the GPU (same source; gh:ml-explore/mlx#3142)."""


@dataclass(frozen=True)
class Constants:
    """The fitted ones.

    Args:
        bandwidth_share: of a chip's peak bandwidth, that reading weights gets.
        kernel_s: between one kernel and the next that needs its result.
        compute_share: of a chip's peak fp16 rate, that matrix products and attention get.
    """

    bandwidth_share: float
    kernel_s: float
    compute_share: float


FITTED = Constants(bandwidth_share=0.76, kernel_s=4.4e-6, compute_share=0.575)


@dataclass(frozen=True)
class EngineProfile:
    """What differs between programs.

    Args:
        name: of the program.
        kernels_per_layer: dispatched in decode.
        prefill_chunk: tokens of a prompt at once.
        slices_head: whether several ranks share the rows of the vocabulary.
        gathers: whether small sums are gathered.
        returns_states: whether a pipeline's last stage hands states back to the first, which has the head; if not, it
            has the head itself, and tells the others the token.
        overlaps_chunks: whether a pipeline's stage goes on with a prompt's next chunk while later stages have this one.
    """

    name: str
    kernels_per_layer: int
    prefill_chunk: int
    slices_head: bool
    gathers: bool
    returns_states: bool
    overlaps_chunks: bool


KIMI_MLX = EngineProfile(
    "kimi-mlx", 28, PREFILL_CHUNK, slices_head=True, gathers=True, returns_states=True, overlaps_chunks=True
)
"""28: counted on the graph, docs/benchmark.md."""

MLX_LM = EngineProfile(
    "mlx-lm", 44, 2048, slices_head=False, gathers=False, returns_states=False, overlaps_chunks=False
)
"""44: design.md. exo and mlx-engine run mlx-lm's model."""

ENGINE_PROFILES = {engine.name: engine for engine in (KIMI_MLX, MLX_LM)}

Strategy = Literal["single", "pipeline", "tensor", "hybrid", "expert"]
