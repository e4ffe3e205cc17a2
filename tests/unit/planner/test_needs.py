"""Memory per host, and the number of hosts: the same in `models`, `plan` and `doctor`."""

from __future__ import annotations

import pytest

from kimi_mlx.planner.links import TCP
from kimi_mlx.planner.machines import parse_machines
from kimi_mlx.planner.model_shape import known_shape
from kimi_mlx.planner.needs import hosts_needed, memory_per_host
from kimi_mlx.planner.search import make_plan
from kimi_mlx.sizing.expert_memory import ALL_EXPERTS
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS
from kimi_mlx.units import GIB


@pytest.mark.parametrize(
    ("alias", "memory_gib", "gpu_part", "hosts"),
    [
        ("moonlight", 16, 0.75, 2),
        ("moonlight", 24, 0.75, 1),
        ("kimi-k2", 512, 0.75, 2),
        ("kimi-k2.5", 512, 0.75, 2),
        ("kimi-k2-0905", 512, 0.75, 2),
        ("kimi-k2-0905", 512, 0.98, 1),
        ("kimi-k2.5", 256, 0.75, 4),
        ("kimi-k2.5", 16, 0.75, None),
    ],
)
def test_hosts_needed(alias: str, memory_gib: int, gpu_part: float, hosts: int | None) -> None:
    memory = memory_gib * GIB
    assert hosts_needed(known_shape(alias), memory, int(memory * gpu_part)) == hosts


@pytest.mark.parametrize("alias", ["moonlight", "kimi-k2", "kimi-k2.5"])
def test_the_memory_is_that_of_a_plan(alias: str) -> None:
    shape = known_shape(alias)
    context = min(CONTEXT_TOKENS, shape.context_tokens)
    options = make_plan(shape, parse_machines("m3-ultra-512x2"), [TCP], context, expert_memory=ALL_EXPERTS).options
    (single,) = (option for option in options if option.strategy == "single")
    (hybrid,) = (option for option in options if option.strategy == "hybrid")
    assert memory_per_host(shape) == single.memory[0].needed_bytes
    assert memory_per_host(shape, 2) == max(host.needed_bytes for host in hybrid.memory)
    assert shape.weights_bytes < memory_per_host(shape) < 1.2 * shape.weights_bytes + 2e9
