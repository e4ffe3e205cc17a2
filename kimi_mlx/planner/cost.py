"""The cost of running a model: machines and electricity, price per million tokens, break-even with a subscription."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_mlx.errors import UsageError
from kimi_mlx.planner.machines import Machine
from kimi_mlx.planner.search import Plan

DAYS_A_MONTH = 365.25 / 12


@dataclass(frozen=True)
class CostAssumptions:
    """The user's prices and usage, in the currency of the prices.

    Args:
        tokens_a_day: generated tokens per day.
        electricity: price of a kWh.
        years: years of use.
        price: price of all machines; None for the prices in `chips.json`.
        watts: power of all machines at work; None for the values in `chips.json`.
        subscription: price per month of a subscription to compare with; None for no comparison.
    """

    tokens_a_day: float
    electricity: float
    years: float
    price: float | None = None
    watts: float | None = None
    subscription: float | None = None


@dataclass(frozen=True)
class Cost:
    """Cost at a given speed.

    Args:
        price: price of the machines.
        watts: power at work.
        watts_idle: idle power.
        hours_a_day: working hours per day.
        electricity_a_month: electricity per month, at work and idle.
        electricity_per_million: electricity per million tokens, at work only.
        per_million: total cost per million tokens.
        break_even_months: months until the subscription would have cost as much; None without a subscription, or if
            it never would.
        is_possible: whether a day's tokens take at most 24 hours.
    """

    price: float
    watts: float
    watts_idle: float
    hours_a_day: float
    electricity_a_month: float
    electricity_per_million: float
    per_million: float
    break_even_months: float | None
    is_possible: bool


def make_cost(machines: Sequence[Machine], tok_per_s: float, assumptions: CostAssumptions) -> Cost:
    """Return the cost at a speed.

    Args:
        machines: machines to buy and power.
        tok_per_s: decode rate.
        assumptions: the user's prices and usage.

    Raises:
        UsageError: a price or power that neither the table nor the user gives.
    """
    price = _sum_of(machines, [m.price_usd for m in machines], assumptions.price, "price", "--price 19000")
    watts = _sum_of(machines, [m.chip.watts_max for m in machines], assumptions.watts, "watts", "--watts 500")
    idle = sum(m.chip.watts_idle or 0 for m in machines)
    hours = assumptions.tokens_a_day / tok_per_s / 3600
    energy_a_day = (watts * hours + idle * max(24 - hours, 0)) / 1000
    a_month = energy_a_day * assumptions.electricity * DAYS_A_MONTH
    millions_a_month = assumptions.tokens_a_day * DAYS_A_MONTH / 1e6
    saved = None if assumptions.subscription is None else assumptions.subscription - a_month
    return Cost(
        price=price,
        watts=watts,
        watts_idle=idle,
        hours_a_day=hours,
        electricity_a_month=a_month,
        electricity_per_million=1e6 / tok_per_s / 3600 * watts / 1000 * assumptions.electricity,
        per_million=(price / (assumptions.years * 12) + a_month) / millions_a_month,
        break_even_months=price / saved if saved is not None and saved > 0 else None,
        is_possible=hours <= 24,
    )


def _sum_of(
    machines: Sequence[Machine], known: Sequence[float | None], override: float | None, quantity: str, example: str
) -> float:
    if override is not None:
        return override
    unknown = [machine.name for machine, value in zip(machines, known, strict=True) if value is None]
    if unknown:
        raise UsageError(
            f"the {quantity} of `{unknown[0]}` is not known", hint=f"give the total for all machines: `{example}`"
        )
    return sum(value for value in known if value is not None)


def cost_of_plan(plan: Plan, assumptions: CostAssumptions) -> Cost | None:
    """Return the cost of a plan's choice; None if the model does not fit.

    Raises:
        UsageError: a price or power that neither the table nor the user gives.
    """
    if plan.choice is None:
        return None
    machines = [machine for machine in plan.machines if machine.name in plan.choice.hosts]
    return make_cost(machines, plan.choice.best_tok_per_s, assumptions)
