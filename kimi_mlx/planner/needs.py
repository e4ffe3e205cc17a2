"""Memory that a model needs on equal hosts, and the number of hosts that hold it."""

from __future__ import annotations

from kimi_mlx.errors import PlacementError
from kimi_mlx.planner.chips import UNKNOWN_CHIP
from kimi_mlx.planner.constants import KIMI_MLX
from kimi_mlx.planner.machines import Machine
from kimi_mlx.planner.memory import host_memory, memory_by_rank
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.planner.portions import make_portions
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS, MAX_HOSTS, usable_bytes


def memory_per_host(shape: ModelShape, hosts: int = 1) -> int:
    """Return the memory of the host that needs most: weights, an 8k-token cache, and the workspace of prefill.

    Args:
        shape: the model.
        hosts: number of equal hosts that share the model in hybrid.

    Raises:
        PlacementError: the model has fewer parts than there are hosts.
    """
    portions = make_portions("hybrid", shape, hosts)
    machine = Machine("", UNKNOWN_CHIP, 0, 0)
    context = min(CONTEXT_TOKENS, shape.context_tokens)
    ranks = memory_by_rank([machine] * hosts, portions, shape, KIMI_MLX, context)
    return max(host.needed_bytes for host in ranks)


def smallest_memory(shape: ModelShape) -> int:
    """Return the memory that one host needs if as many experts as possible are on its SSD."""
    (portion,) = make_portions("hybrid", shape, 1)
    context = min(CONTEXT_TOKENS, shape.context_tokens)
    return host_memory(Machine("", UNKNOWN_CHIP, 0, 0), portion, shape, KIMI_MLX, context).smallest_bytes


def streams_here(shape: ModelShape, memory_bytes: int, gpu_bytes: int) -> bool:
    """Return whether one host can run the model if some of its experts are read from the SSD.

    Args:
        shape: the model.
        memory_bytes: memory of the host.
        gpu_bytes: part of it that the GPU can use.
    """
    return smallest_memory(shape) <= min(usable_bytes(memory_bytes), gpu_bytes)


def hosts_needed(shape: ModelShape, memory_bytes: int, gpu_bytes: int) -> int | None:
    """Return the smallest number of equal hosts that hold the model in hybrid; None if above MAX_HOSTS.

    Args:
        shape: the model.
        memory_bytes: memory of each host.
        gpu_bytes: part of it that the GPU can use.
    """
    usable = min(usable_bytes(memory_bytes), gpu_bytes)
    for hosts in range(1, MAX_HOSTS + 1):
        try:
            if memory_per_host(shape, hosts) <= usable:
                return hosts
        except PlacementError:
            return None
    return None
