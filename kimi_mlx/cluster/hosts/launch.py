"""How a rank is started: its command and processor, and the variables of MLX's contract that make it one."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence


def rank_command(module: str, python: str = sys.executable) -> list[str]:
    """The command of a rank; everything else reaches it through the environment and its standard input."""
    # Not `-m`, which would import from the folder that the user happens to stand in before anything else.
    code = f"import sys; sys.path[:] = filter(None, sys.path); from {module} import main; main()"
    return [python, "-u", "-c", code]


RING_VARIABLES = frozenset(
    {"MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_JACCL_COORDINATOR", "MLX_IBV_DEVICES", "MLX_JACCL_RING"}
    # JACCL's own names, which it reads before MLX's
    | {"JACCL_RANK", "JACCL_COORDINATOR", "JACCL_IBV_DEVICES", "JACCL_RING"}
)
"""What makes a process a rank of a ring; only the launcher sets them."""


FAST_SYNC = "MLX_METAL_FAST_SYNCH"
"""MLX's variable of the fast fence between GPU and CPU: 0 is off. It can wedge the GPU, and then the Mac must be
restarted (gh:ml-explore/mlx#3142, #3830): nobody gets it who has not asked kimi-mlx for it."""


def without_ring_variables(base: Mapping[str, str]) -> dict[str, str]:
    """An environment without the variables of another ring."""
    return {name: value for name, value in base.items() if name not in RING_VARIABLES}


def cpu_for_rank(rank: int, world_size: int, available: Sequence[int] | None) -> int | None:
    """The processor on which a local rank should stay: ring threads spin, and ten times slower if they are moved.

    None for a rank alone, if there are fewer processors than ranks, or on a system that does not pin.
    """
    if available is None or not 1 < world_size <= len(available):
        return None
    return sorted(available)[rank]


def available_cpus() -> list[int] | None:
    """Processors that this process may use, where the system tells (Linux)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
