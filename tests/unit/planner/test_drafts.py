"""Drafts in the planner: acceptance, the time of a step of several tokens, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kimi_mlx.hub.catalogue import draft_of, drafts
from kimi_mlx.planner.drafts import (
    ASSUMED_TOKENS_PER_STEP,
    PUBLISHED_DRAFTED,
    DraftShape,
    acceptance_of,
    make_draft_shape,
    published_draft_config,
)
from kimi_mlx.planner.links import RDMA, TCP
from kimi_mlx.planner.machines import parse_machines
from kimi_mlx.planner.model_shape import known_shape
from kimi_mlx.planner.search import Plan, make_plan
from kimi_mlx.planner.to_json import plan_to_dict
from kimi_mlx.sizing.draft import draft_memory
from kimi_mlx.sizing.expert_memory import ALL_EXPERTS
from tests.drafts import PUBLISHED

CONTEXT = 8192


def drafted_plan(tokens_per_step: float, machines: str = "m3-ultra-512x2") -> Plan:
    shape = known_shape("kimi-k2.6")
    with_draft = draft(tokens_per_step)
    return make_plan(shape, parse_machines(machines), [RDMA, TCP], CONTEXT, draft=with_draft, expert_memory=ALL_EXPERTS)


def draft(tokens_per_step: float) -> DraftShape:
    return DraftShape("draft", published_draft_config(), tokens_per_step, "")


def test_the_dimensions_are_those_of_the_published_draft_models() -> None:
    config = published_draft_config()
    assert {name: getattr(config, name) for name in PUBLISHED if hasattr(config, name)} == {
        name: value for name, value in PUBLISHED.items() if hasattr(config, name)
    }


def test_acceptance_is_published_or_assumed() -> None:
    known = draft_of("kimi-k2.6")
    assert known is not None
    assert make_draft_shape("", published_draft_config(), known).tokens_per_step == known.tokens_per_step == 3.2
    for entry in drafts():
        made = make_draft_shape("", published_draft_config(), entry)
        assert made.tokens_per_step == (entry.tokens_per_step or ASSUMED_TOKENS_PER_STEP)
        assert made.source
    assert make_draft_shape("", published_draft_config(), None).source.startswith("assumed")


@pytest.mark.parametrize("tokens_per_step", [1.0, 1.5, 2.65, 3.2, 4.0])
def test_acceptance_reproduces_the_published_number(tokens_per_step: float) -> None:
    shape = draft(tokens_per_step)
    counts = [shape.tokens_of(drafted) for drafted in range(PUBLISHED_DRAFTED + 1)]
    assert counts[0] == 1
    assert counts[-1] == pytest.approx(tokens_per_step)
    assert counts == sorted(counts)
    assert 0 <= acceptance_of(tokens_per_step, PUBLISHED_DRAFTED) <= 1


def test_a_step_pays_kernels_once_reads_more_experts_and_drafts() -> None:
    for option in drafted_plan(3.2).options:
        drafted = option.drafted
        assert drafted is not None
        step, one = drafted.step, option.decode
        assert step.kernels_s == one.kernels_s
        assert one.read_s < step.read_s < (1 + drafted.drafted) * one.read_s
        assert step.fences_s - one.fences_s <= 181e-6  # the message with the draft tokens
        assert step.draft_s > 0 == one.draft_s
        assert drafted.tok_per_s > option.decode_tok_per_s
        assert option.token.total_s == pytest.approx(1 / drafted.tok_per_s)


def test_nothing_is_drafted_where_it_would_lose() -> None:
    result = drafted_plan(1.0)
    assert all(option.drafted is None for option in result.options)
    without = make_plan(result.shape, result.machines, [RDMA, TCP], CONTEXT, expert_memory=ALL_EXPERTS)
    rates = [option.best_tok_per_s for option in result.options]
    assert rates == [option.decode_tok_per_s for option in without.options]


def test_more_acceptance_is_never_slower() -> None:
    rates = [drafted_plan(number).options[0].best_tok_per_s for number in (1.0, 1.5, 2.0, 2.65, 3.2)]
    assert rates == sorted(rates)


def test_the_draft_model_is_in_the_memory_of_rank_0() -> None:
    result = drafted_plan(3.2)
    without = make_plan(result.shape, result.machines, [RDMA, TCP], CONTEXT, expert_memory=ALL_EXPERTS)
    key = lambda option: (option.placement, option.hosts, option.backend)  # noqa: E731
    others = {key(option): option for option in without.options}
    size = draft_memory(published_draft_config()).total_bytes(CONTEXT)
    assert 1.9e9 < size < 2.1e9
    for option in result.options:
        first, *rest = option.memory
        before = others[key(option)].memory
        assert first.needed_bytes == before[0].needed_bytes + size
        assert tuple(rest) == before[1:]
        assert option.longest_context <= others[key(option)].longest_context


def test_an_embedding_of_its_own_takes_memory_but_is_not_read() -> None:
    config = published_draft_config()
    without, with_embedding = (make_draft_shape("", config, None, has_embedding) for has_embedding in (False, True))
    more = with_embedding.memory.weights_bytes - without.memory.weights_bytes
    assert more == 2 * config.vocab_size * config.hidden_size
    assert with_embedding.read_bytes(3, CONTEXT) == without.read_bytes(3, CONTEXT)


def test_shares_by_memory_leave_room_for_the_draft_model() -> None:
    machines = "m3-ultra-512,m4-max-128"
    shape = known_shape("kimi-k2")
    for with_draft in (None, draft(3.2)):
        result = make_plan(
            shape, parse_machines(machines), [RDMA], CONTEXT, draft=with_draft, expert_memory=ALL_EXPERTS
        )
        assert result.choice is not None
        free = [host.raised_gpu_bytes - host.needed_bytes for host in result.choice.memory]
        assert min(free) > 0


def test_json_has_the_draft_with_and_without() -> None:
    value = plan_to_dict(drafted_plan(3.2))
    assert value["draft"]["tokens_per_step"] == 3.2
    option = value["options"][value["choice"]]
    assert option["drafted"]["tok_per_s"] > option["decode"]["tok_per_s"]
    assert option["drafted"]["total_s"] == pytest.approx(
        sum(seconds for name, seconds in option["drafted"].items() if name.endswith("_s") and name != "total_s")
        - option["drafted"]["tok_per_s"]
    )
    without = replace(drafted_plan(3.2), draft=None)
    assert plan_to_dict(without)["draft"] is None
