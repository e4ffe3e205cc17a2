"""Start of a rank: its command, its processor, and the environment variables by which MLX recognizes it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence


def rank_command(module: str, python: str = sys.executable) -> list[str]:
    """Return the command of a rank; it gets everything else from the environment and its standard input."""
    # Not `-m`, which would search the current folder for imports first.
    code = f"import sys; sys.path[:] = filter(None, sys.path); from {module} import main; main()"
    return [python, "-u", "-c", code]


RING_VARIABLES = frozenset(
    {"MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_JACCL_COORDINATOR", "MLX_IBV_DEVICES", "MLX_JACCL_RING"}
    # JACCL's names, which take precedence over MLX's
    | {"JACCL_RANK", "JACCL_COORDINATOR", "JACCL_IBV_DEVICES", "JACCL_RING"}
)
"""Variables that make a process a rank of a ring; only the launcher sets them."""


FAST_SYNC = "MLX_METAL_FAST_SYNCH"
"""MLX's variable for the fast fence between GPU and CPU; 0 is off. It can hang the GPU, and then the Mac must be
restarted (gh:ml-explore/mlx#3142, #3830), so kimi-mlx sets it only on request."""


def without_ring_variables(base: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables of another ring."""
    return {name: value for name, value in base.items() if name not in RING_VARIABLES}


def cpu_for_rank(rank: int, world_size: int, available: Sequence[int] | None) -> int | None:
    """Return the processor for a local rank: MLX's ring threads spin, and are ten times slower if they migrate.

    None for a single rank, for fewer processors than ranks, or on a system without pinning.
    """
    if available is None or not 1 < world_size <= len(available):
        return None
    return sorted(available)[rank]


def available_cpus() -> list[int] | None:
    """Return the processors that this process may use; None where the system does not say (not Linux)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
