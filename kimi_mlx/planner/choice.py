"""Choose the strategy for given hosts, with the reason in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kimi_mlx.errors import PlacementError
from kimi_mlx.planner.calibration import Calibration
from kimi_mlx.planner.constants import KIMI_MLX, Strategy
from kimi_mlx.planner.drafts import DraftShape
from kimi_mlx.planner.links import LinkProfile
from kimi_mlx.planner.machines import Machine
from kimi_mlx.planner.memory import HostMemory, memory_by_rank
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.planner.portions import make_portions
from kimi_mlx.planner.search import Option, best_of, make_plan, strategy_by_memory
from kimi_mlx.sizing.expert_memory import AUTO, ExpertMemory
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS

SLOW_HOP_S = 0.5e-3
"""Hop time from which `by_rule` treats a link as slow: the 61 all-reduces per token of K2 then take longer than the
computation on a Mac."""

MIN_CALIBRATED_BYTES = 50e6
"""Weights of a model from which on measuring pays: smaller ones answer at once with any strategy."""

UNEVEN = 1.05
"""Ratio of memory sizes above which `by_rule` gives shares by memory."""


@dataclass(frozen=True)
class Choice:
    """A chosen strategy.

    Args:
        strategy: strategy as `--strategy` takes it.
        reason: why it was chosen, shown to the user.
        memory: memory that each rank needs with all experts in memory, if it is known.
        calibration: measured times on which the choice is based, if any.
    """

    strategy: str
    reason: str
    memory: tuple[HostMemory, ...] = ()
    calibration: Calibration | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the choice for JSON, with its measured times and predicted speeds, if there are any."""
        measured = {} if self.calibration is None else {"calibration": self.calibration.to_dict()}
        return {"strategy": self.strategy, "reason": self.reason, **measured}


def choose(
    shape: ModelShape | None,
    machines: Sequence[Machine],
    link: LinkProfile | None,
    *,
    is_fast_sync: bool = False,
    draft: DraftShape | None = None,
    expert_memory: ExpertMemory = AUTO,
) -> Choice:
    """Return the best strategy for all of these machines together.

    Args:
        shape: the model; None if its dimensions are not known.
        machines: one machine per rank, two or more, with different names.
        link: link between them; None if it is not known.
        is_fast_sync: whether MLX_METAL_FAST_SYNCH=1 is set.
        draft: draft model; None without one.
        expert_memory: memory for routed experts on each rank.
    """
    if shape is None:
        return by_rule(shape, machines, link, "the model's dimensions are not known", draft)
    if unknown := next((machine for machine in machines if not machine.is_known), None):
        return by_rule(shape, machines, link, f"no prediction for `{unknown.name}`", draft)
    if link is None:
        return by_rule(shape, machines, link, "the link was not measured", draft)
    plan = make_plan(
        shape, machines, [link], _context(shape), is_fast_sync=is_fast_sync, draft=draft, expert_memory=expert_memory
    )
    options = [option for option in plan.options if len(option.hosts) == len(machines)]
    if not options:
        return by_rule(shape, machines, link, plan.notes[0], draft)
    best = _best(options)
    others = [option for option in options if option.strategy != best.strategy and option.fits == best.fits]
    return Choice(
        best.placement, _reason(best, best_of(others), link), memory_of(best.placement, shape, machines, draft)
    )


def by_rule(
    shape: ModelShape | None,
    machines: Sequence[Machine],
    link: LinkProfile | None,
    reason: str,
    draft: DraftShape | None = None,
) -> Choice:
    """Choose without predictions: hybrid, or pipeline over a slow link.

    Hybrid splits nearly all work with one all-reduce per layer. No other strategy is better in general: tensor needs
    twice as many all-reduces, and with expert the ranks never have equal work.

    Args:
        shape: the model; None if its dimensions are not known.
        machines: one machine per rank.
        link: link between them; None if it is not known.
        reason: reason why there is no prediction.
        draft: draft model; None without one.
    """
    is_slow = link is not None and link.hop_s >= SLOW_HOP_S
    full_reason = f"{describe_link(link)}, {reason}" if link is not None else reason
    return _with_shares("pipeline" if is_slow else "hybrid", shape, machines, full_reason, draft)


def needs_calibration(shape: ModelShape | None, machines: Sequence[Machine], link: LinkProfile | None) -> bool:
    """Return whether `choose` has no prediction, but could measure: an unknown machine or link, and a large model."""
    if shape is None or shape.weights_bytes < MIN_CALIBRATED_BYTES:
        return False
    return link is None or not all(machine.is_known for machine in machines)


def by_calibration(
    calibration: Calibration, shape: ModelShape, machines: Sequence[Machine], draft: DraftShape | None = None
) -> Choice:
    """Return the strategy with the fastest predicted decode, with drafts if there are any, from measured times.

    Args:
        calibration: times measured on two ranks or more.
        shape: the model.
        machines: one machine per rank; empty if their memory is not known.
        draft: draft model; None without one.
    """
    best, other, *_ = calibration.predictions(draft=draft)
    drafts = " with drafts" if best.drafted_tok_per_s is not None else ""
    reason = (
        f"a layer and messages measured: {best.best_tok_per_s:.3g} tok/s predicted{drafts}, "
        f"{other.strategy} {other.best_tok_per_s:.3g}"
    )
    choice = _with_shares(best.strategy, shape, machines, reason, draft) if machines else Choice(best.strategy, reason)
    return replace(choice, calibration=calibration)


def choose_pipeline(
    shape: ModelShape | None, machines: Sequence[Machine], difference: str, draft: DraftShape | None = None
) -> Choice:
    """Return the strategy pipeline, the only one for machines that compute with different kernels.

    Args:
        shape: the model; None if its dimensions or the machines are not known.
        machines: one machine per rank; empty if they are not known.
        difference: how the machines differ.
        draft: draft model; None without one.
    """
    return _with_shares("pipeline", shape, machines, f"the only strategy for hosts that differ: {difference}", draft)


def _with_shares(
    name: Strategy, shape: ModelShape | None, machines: Sequence[Machine], reason: str, draft: DraftShape | None
) -> Choice:
    """Return a strategy with equal shares, or with shares by memory if the machines differ in size."""
    sizes = [machine.memory_bytes for machine in machines]
    if shape is None or max(sizes) <= UNEVEN * min(sizes):
        return Choice(name, reason, memory_of(name, shape, machines, draft))
    strategy = strategy_by_memory(name, machines, shape, draft)
    return Choice(strategy, f"shares by memory, {reason}", memory_of(strategy, shape, machines, draft))


def memory_of(
    strategy: str, shape: ModelShape | None, machines: Sequence[Machine], draft: DraftShape | None = None
) -> tuple[HostMemory, ...]:
    """Return the memory that each rank needs with all experts in memory; empty if it is not known."""
    if shape is None:
        return ()
    try:
        portions = make_portions(strategy, shape, len(machines))
    except PlacementError:
        return ()
    draft_memory = None if draft is None else draft.memory
    return memory_by_rank(machines, portions, shape, KIMI_MLX, _context(shape), draft_memory)


def describe_link(link: LinkProfile) -> str:
    """Describe a link, such as `TCP at 1.2 ms per message`."""
    name = {"rdma": "RDMA", "wifi": "Wi-Fi"}.get(link.name, "TCP")
    return f"{name} at {link.hop_s * 1e3:.2g} ms per message"


def _context(shape: ModelShape) -> int:
    return min(CONTEXT_TOKENS, shape.context_tokens)


def _best(options: Sequence[Option]) -> Option:
    """Return the best option that fits: now, else with raised limits, else with experts on the SSD.

    If none does, return the one that lacks the least memory.
    """
    for fits in ("yes", "raised", "ssd"):
        if (best := best_of([option for option in options if option.fits == fits])) is not None:
            return best
    return min(options, key=lambda option: max(host.needed_bytes - host.raised_gpu_bytes for host in option.memory))


def _reason(best: Option, other: Option | None, link: LinkProfile) -> str:
    shares = "shares by memory, " if best.shares != "even" else ""
    prediction = f"{shares}{describe_link(link)}: {best.best_tok_per_s:.1f} tok/s predicted"
    if best.fits == "no":
        return f"{prediction}, but it does not fit"
    if best.experts is not None:
        prediction += f" with {100 * best.experts.streaming.kept_share:.0f} % of the experts in memory"
    return prediction if other is None else f"{prediction}, {other.strategy} {other.best_tok_per_s:.1f}"
