"""Cost per million tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kimi_mlx.errors import UsageError
from kimi_mlx.planner.cost import CostAssumptions, make_cost
from kimi_mlx.planner.machines import parse_machines

TWO = parse_machines("m3-ultra-512x2")
ASSUMPTIONS = CostAssumptions(tokens_a_day=1e6, electricity=0.30, years=4, subscription=200)


def test_cost_equals_a_manual_calculation() -> None:
    cost = make_cost(TWO, 20, ASSUMPTIONS)
    assert cost.price == 2 * 9499
    assert cost.hours_a_day == pytest.approx(1e6 / 20 / 3600)
    assert cost.electricity_per_million == pytest.approx(1e6 / 20 / 3600 * 0.5 * 0.30)
    a_month = 1e6 * 365.25 / 12 / 1e6
    assert cost.per_million == pytest.approx((18998 / 48 + cost.electricity_a_month) / a_month)
    assert cost.break_even_months == pytest.approx(18998 / (200 - cost.electricity_a_month))


def test_some_subscriptions_never_break_even() -> None:
    assert make_cost(TWO, 20, replace(ASSUMPTIONS, subscription=20)).break_even_months is None
    assert make_cost(TWO, 20, replace(ASSUMPTIONS, subscription=None)).break_even_months is None


def test_too_many_tokens_for_a_day_are_not_possible() -> None:
    assert make_cost(TWO, 20, ASSUMPTIONS).is_possible
    assert not make_cost(TWO, 10, ASSUMPTIONS).is_possible


def test_unknown_prices_must_be_given() -> None:
    machines = parse_machines("m4-max-128")
    with pytest.raises(UsageError, match="price"):
        make_cost(machines, 20, ASSUMPTIONS)
    with pytest.raises(UsageError, match="watts"):
        make_cost(machines, 20, replace(ASSUMPTIONS, price=3500))
    assert make_cost(machines, 20, replace(ASSUMPTIONS, price=3500, watts=150)).watts == 150
