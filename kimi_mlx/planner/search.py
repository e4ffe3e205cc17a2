"""Candidates for machines and links, what each comes to, which one to take, and why the others lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kimi_mlx.errors import PlacementError
from kimi_mlx.parallel.placement import STRATEGIES, normal_strategy
from kimi_mlx.planner.constants import FAST_FENCE_S, FENCE_S, FITTED, KIMI_MLX, Constants, Strategy
from kimi_mlx.planner.links import LinkProfile
from kimi_mlx.planner.machines import Machine
from kimi_mlx.planner.memory import HostMemory, host_memory, longest_context
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.planner.portions import Portion, make_portions
from kimi_mlx.planner.speed import Setup, TimeBreakdown, decode, prefill
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS

Shares = Literal["even", "by memory"]

Fits = Literal["yes", "raised", "no"]
"""As the hosts are; only with `iogpu.wired_limit_mb` raised; not even then."""

PROMPT_TOKENS, ANSWER_TOKENS = 2048, 512
"""Of the exchange by whose duration candidates are compared, and the prompt that prefill is told for."""

PIPELINE_MARGIN = 0.1
"""By so much a pipeline must be faster: published ones on two hosts are a fifth slower than they come out here, and
nothing else is (docs/planner.md, the misses)."""


@dataclass(frozen=True)
class Option:
    """A way to run the model.

    Args:
        strategy: how it is divided.
        placement: the same as `--strategy` takes it, with the weights of uneven shares.
        hosts: that take part, in the order of ranks.
        link: between them; None for one alone.
        memory: of each host.
        longest_context: tokens that fit as the hosts are.
        longest_context_raised: with the wired limit raised.
        decode: a token's parts, at the end of the context that was asked for.
        prefill: the parts of a prompt of PROMPT_TOKENS.
    """

    strategy: Strategy
    placement: str
    hosts: tuple[str, ...]
    link: LinkProfile | None
    memory: tuple[HostMemory, ...]
    longest_context: int
    longest_context_raised: int
    decode: TimeBreakdown
    prefill: TimeBreakdown

    @property
    def shares(self) -> Shares:
        """Evenly, or in proportion to memory."""
        return "by memory" if ":" in self.placement else "even"

    @property
    def fits(self) -> Fits:
        """Whether the context that was asked for fits in memory."""
        if all(each.needed_bytes <= each.gpu_bytes for each in self.memory):
            return "yes"
        return "raised" if all(each.needed_bytes <= each.raised_gpu_bytes for each in self.memory) else "no"

    @property
    def decode_tok_per_s(self) -> float:
        """Of one sequence."""
        return 1 / self.decode.total_s

    @property
    def prefill_tok_per_s(self) -> float:
        """Of a prompt of PROMPT_TOKENS."""
        return PROMPT_TOKENS / self.prefill.total_s

    @property
    def exchange_s(self) -> float:
        """A prompt of PROMPT_TOKENS and an answer of ANSWER_TOKENS."""
        return self.prefill.total_s + ANSWER_TOKENS * self.decode.total_s

    @property
    def backend(self) -> str:
        """Of MLX, or a dash for a host alone."""
        return self.link.backend if self.link else "-"


@dataclass(frozen=True)
class Plan:
    """What was found.

    Args:
        shape: the model.
        machines: all of them.
        context: tokens that were asked for.
        is_fast_sync: with the fast fence.
        options: the ones that can be computed, the fastest first.
        notes: what was not, and why.
    """

    shape: ModelShape
    machines: tuple[Machine, ...]
    context: int
    is_fast_sync: bool
    options: tuple[Option, ...]
    notes: tuple[str, ...] = ()

    @property
    def choice(self) -> Option | None:
        """The best of what fits; None if nothing does."""
        return best_of([option for option in self.options if option.fits != "no"])


def best_of(options: Sequence[Option]) -> Option | None:
    """The fastest; a pipeline only if it is so by PIPELINE_MARGIN."""
    fastest = min(options, key=lambda option: option.exchange_s, default=None)
    if fastest is None or fastest.strategy != "pipeline":
        return fastest
    others = [option for option in options if option.strategy != "pipeline"]
    other = min(others, key=lambda option: option.exchange_s, default=fastest)
    return other if other.exchange_s <= fastest.exchange_s * (1 + PIPELINE_MARGIN) else fastest


def make_plan(
    shape: ModelShape,
    machines: Sequence[Machine],
    links: Sequence[LinkProfile],
    context: int,
    *,
    is_fast_sync: bool = False,
    constants: Constants = FITTED,
) -> Plan:
    """Compare all candidates.

    Args:
        shape: of the model.
        machines: the hosts; subsets of them, the largest ones, are candidates, too.
        links: between them, a candidate each.
        context: tokens to have room for; decode is predicted at its end.
        is_fast_sync: with MLX_METAL_FAST_SYNCH=1.
        constants: fitted ones.
    """
    notes: dict[str, None] = {}
    options: list[Option] = []
    fence_s = FAST_FENCE_S if is_fast_sync else FENCE_S
    for strategy, shares, hosts, link in _candidates(machines, links):
        if link is not None and (problem := _no_link(hosts, link)) is not None:
            notes[problem] = None
            continue
        placement = strategy_by_memory(strategy, hosts, shape) if shares == "by memory" else strategy
        try:
            portions = make_portions(placement, shape, len(hosts), KIMI_MLX.slices_head)
        except PlacementError as error:
            notes[f"{strategy} on {len(hosts)}: {error.message}"] = None
            continue
        setup = Setup(shape, strategy, hosts, portions, link, KIMI_MLX, fence_s, constants)
        options.append(_option(setup, placement, context))
    options.sort(key=lambda option: option.exchange_s)
    return Plan(shape, tuple(machines), context, is_fast_sync, tuple(options), tuple(notes))


def _candidates(
    machines: Sequence[Machine], links: Sequence[LinkProfile]
) -> Iterator[tuple[Strategy, Shares, list[Machine], LinkProfile | None]]:
    """The largest host alone, then the largest two, and so on, by strategy and link."""
    largest = sorted(machines, key=lambda machine: -machine.raised_gpu_bytes)
    yield "single", "even", largest[:1], None
    for count in range(2, len(largest) + 1):
        hosts = [machine for machine in machines if machine in largest[:count]]
        is_equal = len({machine.memory_bytes for machine in hosts}) == 1
        for strategy in STRATEGIES:
            for link in links:
                yield strategy, "even", hosts, link
                if not is_equal:
                    yield strategy, "by memory", hosts, link


def strategy_by_memory(strategy: Strategy, machines: Sequence[Machine], shape: ModelShape) -> str:
    """The strategy with a weight for each machine, so that all become equally full; thousandths in all."""
    free = [_free_bytes(machine, strategy, shape) for machine in machines]
    weights = [max(1, round(1000 * each / sum(free))) for each in free]
    return normal_strategy(":".join([strategy, *map(str, weights)]), len(machines))


def _free_bytes(machine: Machine, strategy: Strategy, shape: ModelShape) -> float:
    """What a host has for its share, after what it needs whatever its share is; at least a little.

    For CONTEXT_TOKENS, so that shares do not depend on the context that was asked for.
    """
    if strategy == "pipeline":
        base = Portion(0, 0, embedding=0, head=0)
    else:
        heads = 0 if strategy == "tensor" else 1
        base = Portion(shape.layers, shape.moe_layers, head=0, heads=heads, expert_rows=0, shared_rows=0, dense_rows=0)
    taken = host_memory(machine, base, shape, KIMI_MLX, min(CONTEXT_TOKENS, shape.context_tokens)).needed_bytes
    return max(machine.raised_gpu_bytes - taken, 1.0)


def _no_link(hosts: Sequence[Machine], link: LinkProfile) -> str | None:
    """Why these hosts cannot be joined so; None if they can."""
    if link.backend != "jaccl":
        return None
    old = [machine.name for machine in hosts if not machine.chip.has_rdma]
    if old:
        return f"no jaccl with {', '.join(old)}: RDMA needs Thunderbolt 5"
    short = [machine.name for machine in hosts if machine.chip.thunderbolt_ports < len(hosts) - 1]
    if short:
        return f"no jaccl for {len(hosts)} hosts: a cable between every two needs {len(hosts) - 1} ports ({short[0]})"
    return None


def _option(setup: Setup, placement: str, context: int) -> Option:
    pairs = list(zip(setup.machines, setup.portions, strict=True))
    longest = [
        longest_context(setup.machines, setup.portions, setup.shape, setup.engine, is_raised=is_raised)
        for is_raised in (False, True)
    ]
    return Option(
        setup.strategy,
        placement,
        tuple(machine.name for machine in setup.machines),
        setup.link,
        tuple(host_memory(machine, portion, setup.shape, setup.engine, context) for machine, portion in pairs),
        longest[0],
        longest[1],
        decode(setup, context),
        prefill(setup, PROMPT_TOKENS),
    )
