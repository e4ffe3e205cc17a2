"""Chosen strategies and their reasons."""

from __future__ import annotations

import pytest

from kimi_mlx.planner.choice import SLOW_HOP_S, choose, memory_of
from kimi_mlx.planner.links import RDMA, TCP, WIFI, LinkProfile, measured_link
from kimi_mlx.planner.machines import any_machine, parse_machines
from kimi_mlx.planner.model_shape import known_shape
from kimi_mlx.sizing.expert_memory import ALL_EXPERTS
from kimi_mlx.units import GIB

K2 = known_shape("kimi-k2")
SLOW, FAST = measured_link(2.4e-3, 1e8), measured_link(0.2e-3, 1e9)
LINUX = [any_machine(f"host-{number}", "x86_64", 64 * GIB, None) for number in range(2)]


@pytest.mark.parametrize(
    ("link", "is_fast_sync", "strategy"),
    [(RDMA, False, "hybrid"), (RDMA, True, "tensor"), (TCP, False, "pipeline"), (WIFI, False, "pipeline")],
)
def test_choice_for_two_studios(link: LinkProfile, is_fast_sync: bool, strategy: str) -> None:
    assert choose(K2, parse_machines("m3-ultra-512x2"), link, is_fast_sync=is_fast_sync).strategy == strategy


def test_the_reason_names_the_link_its_speed_and_the_next_best_strategy() -> None:
    reason = choose(K2, parse_machines("m3-ultra-512x2"), SLOW).reason
    assert reason == "TCP at 1.2 ms per message: 22.7 tok/s predicted, hybrid 8.0"


def test_unequal_macs_get_shares_by_memory() -> None:
    choice = choose(K2, parse_machines("m3-ultra-512,m4-max-128"), SLOW)
    assert choice.strategy.startswith("pipeline:")
    assert "shares by memory" in choice.reason
    large, small = choice.memory
    assert large.weights_bytes > 4 * small.weights_bytes
    assert all(host.needed_bytes <= host.raised_gpu_bytes for host in choice.memory)


def test_a_model_that_does_not_fit_is_still_placed() -> None:
    choice = choose(K2, parse_machines("m3-ultra-256x2"), RDMA, expert_memory=ALL_EXPERTS)
    assert "does not fit" in choice.reason
    assert len(choice.memory) == 2


def test_experts_on_the_ssd_are_part_of_the_reason() -> None:
    choice = choose(K2, parse_machines("m3-ultra-256x2"), RDMA)
    assert "with 63 % of the experts in memory" in choice.reason
    assert choice.memory == memory_of(choice.strategy, K2, parse_machines("m3-ultra-256x2"))  # with all experts


def test_unknown_hosts_use_the_rule() -> None:
    assert choose(K2, LINUX, FAST).strategy == "hybrid"
    assert "no prediction for `host-0`" in choose(K2, LINUX, FAST).reason
    assert choose(K2, LINUX, SLOW).strategy == "pipeline"
    assert choose(K2, LINUX, measured_link(2 * SLOW_HOP_S, 1e9)).strategy == "pipeline"
    small = any_machine("host-2", "x86_64", 32 * GIB, None)
    assert choose(known_shape("moonlight"), [LINUX[0], small], FAST).strategy.startswith("hybrid:")
    assert choose(None, [LINUX[0], small], FAST).strategy == "hybrid"


def test_memory_of_a_strategy() -> None:
    first, second = memory_of("pipeline:3:1", K2, parse_machines("m3-ultra-512x2"))
    assert first.weights_bytes > 2 * second.weights_bytes
    assert first.weights_bytes + second.weights_bytes == pytest.approx(K2.weights_bytes)
    assert first.cache_bytes > 2 * second.cache_bytes
    assert memory_of("tensor", None, LINUX) == ()
