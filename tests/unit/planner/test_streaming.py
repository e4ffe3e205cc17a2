"""Predictions for experts on the SSD: properties that hold for any constants, and what a plan says of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kimi_mlx.planner.constants import FENCE_S, FITTED, KIMI_MLX, Strategy
from kimi_mlx.planner.expectation import expect
from kimi_mlx.planner.links import RDMA
from kimi_mlx.planner.machines import Machine, SsdRate, any_machine, parse_machines
from kimi_mlx.planner.model_shape import known_shape, with_expert_bits
from kimi_mlx.planner.portions import make_portions
from kimi_mlx.planner.reasons import rejection_reason
from kimi_mlx.planner.search import STRATEGIES, Option, fits_with_auto, make_plan
from kimi_mlx.planner.speed import Setup, decode, prefill
from kimi_mlx.planner.streaming import plan_streaming, uniform
from kimi_mlx.planner.to_json import plan_to_dict
from kimi_mlx.sizing.engine_limits import StreamingLimits
from kimi_mlx.sizing.expert_memory import AUTO, ExpertMemory
from kimi_mlx.sizing.experts import ExpertBudget
from kimi_mlx.units import GB

K2 = known_shape("kimi-k2.6")
TWO_BITS = with_expert_bits(K2, 2)
M5 = parse_machines("m5-max-128")
TWO = parse_machines("m5-max-128x2")


def with_ssd(machines: tuple[Machine, ...], gb_per_s: float) -> tuple[Machine, ...]:
    return tuple(replace(machine, known_ssd=SsdRate(gb_per_s * GB, "given")) for machine in machines)


def setup(setting: ExpertMemory, machines: tuple[Machine, ...] = M5, strategy: Strategy = "single") -> Setup:
    portions = make_portions(strategy if len(machines) > 1 else "hybrid", TWO_BITS, len(machines))
    streaming = plan_streaming(machines, portions, TWO_BITS, 8192, setting)
    link = RDMA if len(machines) > 1 else None
    return Setup(TWO_BITS, strategy, machines, portions, link, KIMI_MLX, FENCE_S, FITTED, streaming=streaming)


def choice_of(machines: tuple[Machine, ...], setting: ExpertMemory = AUTO) -> Option:
    choice = make_plan(TWO_BITS, machines, [RDMA], 8192, expert_memory=setting).choice
    assert choice is not None
    return choice


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
def test_more_memory_for_experts_is_never_slower(strategy: Strategy) -> None:
    machines = M5 if strategy == "single" else TWO
    settings = [ExpertMemory("size", share=share) for share in (0.0, 0.05, 0.3, 0.7, 1.0)]
    setups = [setup(setting, machines, strategy) for setting in settings]
    assert setups[-1].streaming is None
    for times in ([decode(each, 8192) for each in setups], [prefill(each, 2048) for each in setups]):
        seconds = [time.total_s for time in times]
        assert seconds == sorted(seconds, reverse=True)
        assert times[0].ssd_s > 0 == times[-1].ssd_s == times[-1].syncs_s


def test_a_faster_ssd_is_faster() -> None:
    times = [decode(setup(AUTO, with_ssd(M5, rate)), 8192) for rate in (3.0, 7.0, 14.0, 1e6)]
    assert [time.total_s for time in times] == sorted((time.total_s for time in times), reverse=True)
    assert times[-1].ssd_s == 0


def test_the_time_of_the_ssd_is_that_of_the_misses() -> None:
    """Nothing else is as slow as a very slow SSD."""
    slow = setup(AUTO, with_ssd(M5, 0.1))
    assert slow.streaming is not None
    time = decode(slow, 8192)
    assert time.total_s == pytest.approx(slow.streaming.token_read_bytes(TWO_BITS) / 1e8, rel=0.05)


def test_two_hosts_read_their_halves_at_the_same_time() -> None:
    half = ExpertMemory("size", share=0.2)
    one, two = setup(half), setup(half, TWO, "hybrid")
    assert one.streaming is not None
    assert two.streaming is not None
    assert two.streaming.hit_rate(TWO_BITS) == pytest.approx(one.streaming.hit_rate(TWO_BITS), abs=0.01)
    assert decode(two, 8192).ssd_s < 0.6 * decode(one, 8192).ssd_s
    stages = setup(half, TWO, "pipeline")  # one after the other
    assert decode(stages, 8192).ssd_s == pytest.approx(decode(one, 8192).ssd_s, rel=0.1)


def test_equal_popularity_has_the_fewest_hits() -> None:
    streaming = setup(AUTO).streaming
    assert streaming is not None
    even = uniform(streaming)
    assert even.hit_rate(TWO_BITS) == pytest.approx(streaming.kept_share)
    assert streaming.hit_rate(TWO_BITS) > 2 * even.hit_rate(TWO_BITS)


def test_what_does_not_fit_is_read_from_the_ssd() -> None:
    choice = choice_of(M5)
    assert choice.fits == "ssd"
    assert choice.experts is not None
    (memory,) = choice.memory
    assert memory.needed_bytes < memory.gpu_bytes
    assert 0.15 < memory.kept_share < 0.25
    assert choice.experts.uniform_tok_per_s < choice.decode_tok_per_s < choice.experts.raised_tok_per_s
    assert choice.longest_context == TWO_BITS.context_tokens  # a long context leaves memory for fewer experts
    assert choice_of(TWO).best_tok_per_s > choice.best_tok_per_s


def test_a_set_size_is_planned() -> None:
    choice = choice_of(M5, ExpertMemory("size", num_bytes=20 * GB))
    assert choice.experts is not None
    assert choice.experts.streaming.kept_bytes == 20 * GB
    large = ExpertMemory("size", num_bytes=300 * GB)
    too_large = make_plan(TWO_BITS, M5, [], 8192, expert_memory=large)
    assert too_large.choice is None
    assert fits_with_auto(too_large, [])
    (option,) = too_large.options
    assert 300 * GB < option.memory[0].needed_bytes < TWO_BITS.weights_bytes
    assert option.experts is not None
    assert option.experts.raised_kept_share == option.experts.streaming.kept_share < 1
    assert choice_of(parse_machines("m3-ultra-512"), ExpertMemory("size", share=1.0)).experts is None


def test_a_model_whose_rest_does_not_fit_is_refused() -> None:
    result = make_plan(K2, parse_machines("m5-24"), [], 8192)
    assert result.choice is None
    (option,) = result.options
    assert "even with experts on the SSD; its GPU can use 18.0 GiB at most" in (rejection_reason(option, result) or "")


def test_json_names_the_assumptions() -> None:
    value = plan_to_dict(make_plan(TWO_BITS, M5, [], 8192))
    assert value["streaming"]["zipf_exponent"] == 0.8
    assert value["machines"][0]["ssd"] == {"bytes_per_s": 13.6e9, "source": "published"}
    experts = value["options"][0]["experts"]
    assert 0 < experts["uniform_hit_rate"] < experts["hit_rate"] < 1
    assert experts["ranks"][0]["ssd_bytes_per_s"] == 13.6e9
    assert value["options"][0]["decode"]["ssd_s"] > 0


def test_a_loaded_model_is_expected_to_be_as_planned() -> None:
    streaming = setup(AUTO).streaming
    assert streaming is not None
    (rank,) = streaming.ranks
    budget = ExpertBudget.of(rank.sizes, rank.budget_bytes, StreamingLimits(streaming.chunk, 1))
    found = expect(TWO_BITS, "hybrid", M5, [budget])
    assert found is not None
    assert found.decode_tok_per_s == pytest.approx(choice_of(M5).decode_tok_per_s)
    assert found.kept_share == pytest.approx(streaming.kept_share)
    unknown = expect(TWO_BITS, "hybrid", [any_machine("linux", None, 10**11, None)], [budget])
    assert unknown is not None
    assert unknown.decode_tok_per_s is None
