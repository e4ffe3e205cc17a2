"""The chosen option, and the reasons why others are rejected."""

from __future__ import annotations

import pytest

from kimi_mlx.planner.links import RDMA, TCP, WIFI
from kimi_mlx.planner.machines import parse_machines
from kimi_mlx.planner.model_shape import known_shape
from kimi_mlx.planner.reasons import rejection_reason
from kimi_mlx.planner.search import PIPELINE_MARGIN, STRATEGIES, Option, Plan, make_plan
from kimi_mlx.planner.to_json import plan_to_dict
from kimi_mlx.sizing.expert_memory import ALL_EXPERTS

LINKS = [RDMA, TCP]


def plan(model: str, machines: str, context: int = 8192) -> Plan:
    return make_plan(known_shape(model), parse_machines(machines), LINKS, context, expert_memory=ALL_EXPERTS)


def option_of(result: Plan, strategy: str, hosts: int, shares: str = "even") -> Option:
    return next(
        option
        for option in result.options
        if (option.strategy, len(option.hosts), option.shares) == (strategy, hosts, shares)
    )


def test_k2_at_4_bits_fits_on_two_hosts_but_not_on_one() -> None:
    assert plan("kimi-k2", "m3-ultra-512").choice is None
    two = plan("kimi-k2", "m3-ultra-512x2")
    assert two.choice is not None
    assert (two.choice.placement, two.choice.fits) == ("hybrid", "yes")
    assert option_of(two, "single", 1).fits == "no"
    assert {option.strategy for option in two.options if len(option.hosts) == 2} == set(STRATEGIES)


def test_int4_fits_on_two_hosts() -> None:
    choice = plan("kimi-k2.5", "m3-ultra-512x2").choice
    assert choice is not None
    assert choice.longest_context == 262144


def test_small_models_run_on_one_host() -> None:
    choice = plan("moonlight", "m1-max-64x2").choice
    assert choice is not None
    assert choice.strategy == "single"


def test_uneven_machines_need_uneven_shares() -> None:
    result = plan("kimi-k2", "m3-ultra-512,m3-ultra-256")
    for strategy in STRATEGIES:
        assert option_of(result, strategy, 2).fits == "no"
        assert option_of(result, strategy, 2, "by memory").fits != "no"
    large, small = option_of(result, "hybrid", 2, "by memory").memory
    assert large.weights_bytes > 1.8 * small.weights_bytes


def test_different_chips_have_only_pipeline() -> None:
    result = plan("kimi-k2", "m3-ultra-512,m4-max-128")
    assert {option.strategy for option in result.options} == {"single", "pipeline"}
    assert result.notes == ("only pipeline with m3-ultra and m4-max: different chips round differently",)
    assert option_of(result, "pipeline", 2).fits == "no"
    assert option_of(result, "pipeline", 2, "by memory").fits == "raised"


def test_a_pipeline_is_chosen_only_by_a_margin() -> None:
    result = plan("kimi-k2.6", "m5-ultra-512x2")
    assert result.choice is not None
    pipeline = option_of(result, "pipeline", 2)
    assert pipeline.request_s < result.choice.request_s < pipeline.request_s * (1 + PIPELINE_MARGIN)
    assert "real pipelines have been slower" in (rejection_reason(pipeline, result) or "")


@pytest.mark.parametrize("machines", ["m3-ultra-512,m5-ultra-512", "m5-ultra-256,m3-ultra-512"])
def test_a_model_that_fits_on_the_fastest_machine_alone_runs_there(machines: str) -> None:
    choice = plan("moonlight", machines).choice
    assert choice is not None
    assert (choice.strategy, choice.hosts[0][:8]) == ("single", "m5-ultra")


def test_equal_machines_are_planned_alone_only_once() -> None:
    result = plan("kimi-k2", "m3-ultra-512x3")
    assert [option.strategy for option in result.options].count("single") == 1


def test_every_rejected_option_has_a_reason() -> None:
    for machines in ("m3-ultra-512x4", "m3-ultra-512,m4-max-128", "m3-ultra-512"):
        result = plan("kimi-k2", machines)
        reasons = [rejection_reason(option, result) for option in result.options]
        assert [option for option, why in zip(result.options, reasons, strict=True) if why is None] == (
            [result.choice] if result.choice else []
        )
        assert all(len(why) < 100 for why in reasons if why)


def test_rdma_needs_thunderbolt_5_and_ports() -> None:
    old = plan("moonlight", "m2-ultra-192x2")
    assert {option.backend for option in old.options} == {"-", "ring"}
    assert "Thunderbolt 5" in old.notes[0]
    many = make_plan(known_shape("kimi-k2"), parse_machines("m4-max-128x6"), [RDMA], 1024)
    assert {len(option.hosts) for option in many.options} == {1, 2, 3, 4, 5}
    assert "5 ports" in many.notes[0]


def test_on_slow_links_a_pipeline_is_faster() -> None:
    result = make_plan(known_shape("kimi-k2"), parse_machines("m3-ultra-512x2"), [WIFI], 8192)
    assert option_of(result, "pipeline", 2).decode_tok_per_s > 4 * option_of(result, "hybrid", 2).decode_tok_per_s


def test_eight_hosts_with_a_small_model() -> None:
    result = plan("moonlight", "m4-max-128x8")
    assert all(option.decode_tok_per_s > 0 for option in result.options)


@pytest.mark.parametrize("context", [1, 8192, 131072])
def test_needed_memory_is_the_sum_of_its_parts(context: int) -> None:
    for option in plan("kimi-k2", "m3-ultra-512x2", context).options:
        for host in option.memory:
            assert host.needed_bytes == host.weights_bytes + host.cache_bytes + host.workspace_bytes
        if option.strategy in ("single", "pipeline"):
            assert sum(host.weights_bytes for host in option.memory) == pytest.approx(577.6e9, rel=0.01)


def test_json_fields() -> None:
    value = plan_to_dict(plan("kimi-k2", "m3-ultra-512x2"))
    assert value["version"] == 4
    assert list(value) == [
        "version",
        "model",
        "machines",
        "context",
        "prompt_tokens",
        "answer_tokens",
        "is_fast_sync",
        "constants",
        "options",
        "choice",
        "notes",
        "cost",
        "first_token_prompt",
        "draft",
        "expert_memory",
        "streaming",
    ]
    option = value["options"][value["choice"]]
    assert list(option) == [
        "strategy",
        "placement",
        "shares",
        "hosts",
        "backend",
        "link",
        "fits",
        "memory",
        "longest_context",
        "longest_context_raised",
        "decode",
        "prefill",
        "request_s",
        "rejection_reason",
        "first_token_s",
        "load_s",
        "drafted",
        "experts",
    ]
    seconds = ["tok_per_s", "read_s", "compute_s", "kernels_s", "fences_s", "link_s", "draft_s"]
    seconds += ["ssd_s", "syncs_s", "total_s"]
    assert list(option["decode"]) == list(option["prefill"]) == seconds
    assert option["rejection_reason"] is None
