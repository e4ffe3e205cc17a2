"""Which strategy given hosts run, and why, in a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_mlx.errors import PlacementError
from kimi_mlx.planner.constants import KIMI_MLX
from kimi_mlx.planner.links import LinkProfile
from kimi_mlx.planner.machines import Machine
from kimi_mlx.planner.memory import HostMemory, host_memory
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.planner.portions import make_portions
from kimi_mlx.planner.search import Option, best_of, make_plan, strategy_by_memory
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS

SLOW_HOP_S = 0.5e-3
"""From here on a link is slow for the plain rule: the 61 sums of a token of K2 then wait longer than a Mac computes."""

UNEVEN = 1.05
"""Hosts whose memory differs by more get shares by memory in the plain rule."""


@dataclass(frozen=True)
class Choice:
    """A strategy that was chosen.

    Args:
        strategy: as `--strategy` takes it.
        why: in words.
        memory: what each rank needs with it, if that is known.
    """

    strategy: str
    why: str
    memory: tuple[HostMemory, ...] = ()

    def to_dict(self) -> dict[str, str]:
        """As JSON."""
        return {"strategy": self.strategy, "why": self.why}


def choose(
    shape: ModelShape | None, machines: Sequence[Machine], link: LinkProfile | None, *, is_fast_sync: bool = False
) -> Choice:
    """The best strategy for all of these machines together.

    Args:
        shape: of the model; None if nothing is known of it.
        machines: one a rank, two or more, of different names.
        link: between them; None if it is not known.
        is_fast_sync: with MLX_METAL_FAST_SYNCH=1.
    """
    if shape is None:
        return by_rule(shape, machines, link, "nothing is known of the model's dimensions")
    if unknown := next((machine for machine in machines if not machine.is_known), None):
        return by_rule(shape, machines, link, f"no prediction for `{unknown.name}`")
    if link is None:
        return by_rule(shape, machines, link, "no link was measured")
    plan = make_plan(shape, machines, [link], _context(shape), is_fast_sync=is_fast_sync)
    options = [option for option in plan.options if len(option.hosts) == len(machines)]
    if not options:
        return by_rule(shape, machines, link, *plan.notes[:1])
    choice = _best(options)
    others = [option for option in options if option.strategy != choice.strategy and option.fits == choice.fits]
    return Choice(choice.placement, _why(choice, best_of(others), link), choice.memory)


def by_rule(shape: ModelShape | None, machines: Sequence[Machine], link: LinkProfile | None, why: str) -> Choice:
    """Without predictions: hybrid, which divides nearly all work for one sum a layer; over a slow link a pipeline.

    Nothing else is better in general: tensor has twice the sums, and whole experts are never busy evenly.
    """
    is_slow = link is not None and link.hop_s >= SLOW_HOP_S
    name = "pipeline" if is_slow else "hybrid"
    words = f"{link_words(link)}, {why}" if link is not None else why
    sizes = [machine.memory_bytes for machine in machines]
    if shape is None or max(sizes) <= UNEVEN * min(sizes):
        return Choice(name, words, memory_of(name, shape, machines))
    strategy = strategy_by_memory(name, machines, shape)
    return Choice(strategy, f"shares by memory, {words}", memory_of(strategy, shape, machines))


def memory_of(strategy: str, shape: ModelShape | None, machines: Sequence[Machine]) -> tuple[HostMemory, ...]:
    """What each rank needs; nothing if it is not known."""
    if shape is None:
        return ()
    try:
        portions = make_portions(strategy, shape, len(machines))
    except PlacementError:
        return ()
    pairs = zip(machines, portions, strict=True)
    return tuple(host_memory(machine, portion, shape, KIMI_MLX, _context(shape)) for machine, portion in pairs)


def link_words(link: LinkProfile) -> str:
    """Such as `TCP at 1.2 ms a message`."""
    name = {"rdma": "RDMA", "wifi": "Wi-Fi"}.get(link.name, "TCP")
    return f"{name} at {link.hop_s * 1e3:.2g} ms a message"


def _context(shape: ModelShape) -> int:
    return min(CONTEXT_TOKENS, shape.context_tokens)


def _best(options: Sequence[Option]) -> Option:
    """The best that fits as the hosts are, else with raised limits, else the one that lacks least."""
    for fits in ("yes", "raised"):
        if (choice := best_of([option for option in options if option.fits == fits])) is not None:
            return choice
    return min(options, key=lambda option: max(each.needed_bytes - each.raised_gpu_bytes for each in option.memory))


def _why(choice: Option, other: Option | None, link: LinkProfile) -> str:
    shares = "shares by memory, " if choice.shares != "even" else ""
    told = f"{shares}{link_words(link)}: {choice.decode_tok_per_s:.1f} tok/s predicted"
    if choice.fits == "no":
        return f"{told}, but it does not fit"
    return told if other is None else f"{told}, {other.strategy} {other.decode_tok_per_s:.1f}"
