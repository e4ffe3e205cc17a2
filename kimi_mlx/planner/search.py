"""Compare the ways to run a model on given machines and links, and choose one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kimi_mlx.errors import PlacementError
from kimi_mlx.parallel.placement import STRATEGIES, normalize_strategy
from kimi_mlx.planner.constants import FAST_FENCE_S, FENCE_S, FITTED, KIMI_MLX, Constants, Strategy
from kimi_mlx.planner.drafts import DraftShape
from kimi_mlx.planner.links import TCP, LinkProfile
from kimi_mlx.planner.machines import Machine
from kimi_mlx.planner.memory import HostMemory, host_memory, longest_context, memory_by_rank
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.planner.portions import Portion, make_portions
from kimi_mlx.planner.speed import DraftedDecode, Setup, TimeBreakdown, decode, decode_with_draft, prefill
from kimi_mlx.planner.streaming import Limit, Streaming, plan_streaming, uniform
from kimi_mlx.sizing.expert_memory import AUTO, ExpertMemory
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS, MAX_HOSTS

Shares = Literal["even", "by memory"]

Fits = Literal["yes", "raised", "ssd", "no"]
"""Whether an option fits: with the current limits, only with `iogpu.wired_limit_mb` raised, only with some experts on
the SSD, or not even then."""

PROMPT_TOKENS, ANSWER_TOKENS = 2048, 512
"""Length of the request whose duration ranks the options. Prefill is also predicted for this prompt."""

FIRST_TOKEN_PROMPT = 8192
"""Length of the prompt whose time to the first token is predicted."""

PIPELINE_MARGIN = 0.1
"""Margin by which a pipeline must be faster to be chosen: only published pipelines on two hosts are a fifth slower than
predicted (docs/planner.md, "Backtest")."""


@dataclass(frozen=True)
class StreamedOption:
    """Use of the SSD by an option.

    Args:
        streaming: experts in memory, and rates of the SSDs.
        hit_rate: expected share of the chosen experts that are in memory.
        token_read_bytes: bytes per token that all SSDs together read.
        uniform_hit_rate: hit rate if all experts were equally popular.
        uniform_tok_per_s: decode rate if all experts were equally popular.
        raised_kept_share: fraction of the experts that would stay in memory with the GPU's limit raised; if the option
            does not fit then either, as planned.
        raised_tok_per_s: decode rate for that fraction.
    """

    streaming: Streaming
    hit_rate: float
    token_read_bytes: float
    uniform_hit_rate: float
    uniform_tok_per_s: float
    raised_kept_share: float
    raised_tok_per_s: float


@dataclass(frozen=True)
class Option:
    """A way to run the model.

    Args:
        strategy: strategy of the split.
        placement: strategy as `--strategy` takes it, with the weights of uneven shares.
        hosts: hosts in the order of ranks.
        link: link between them; None for a single host.
        memory: memory of each host.
        longest_context: longest context that fits with the current limits.
        longest_context_raised: longest context with the wired limit raised.
        decode: time of one token at the end of the requested context.
        prefill: time of a prompt of PROMPT_TOKENS.
        first_token_s: time to the first token after a prompt of FIRST_TOKEN_PROMPT tokens, or of the whole context.
        load_s: time in which the slowest SSD reads its host's weights.
        drafted: decode with the draft model; None without one, or if drafting would be slower.
        experts: experts that are read from the SSD; None if all are in memory.
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
    first_token_s: float
    load_s: float
    drafted: DraftedDecode | None = None
    experts: StreamedOption | None = None

    @property
    def shares(self) -> Shares:
        """Whether shares are even or in proportion to memory."""
        return "by memory" if ":" in self.placement else "even"

    @property
    def fits(self) -> Fits:
        """Whether the requested context fits in memory."""
        if any(host.needed_bytes > host.raised_gpu_bytes for host in self.memory):
            return "no"
        if self.experts is not None:
            return "ssd"
        return "yes" if all(host.needed_bytes <= host.gpu_bytes for host in self.memory) else "raised"

    @property
    def decode_tok_per_s(self) -> float:
        """Decode rate of one sequence, without drafts."""
        return 1 / self.decode.total_s

    @property
    def token(self) -> TimeBreakdown:
        """Time of one token, with drafts if there are any."""
        return self.decode if self.drafted is None else self.drafted.step / self.drafted.tokens_per_step

    @property
    def best_tok_per_s(self) -> float:
        """Decode rate of one sequence, with drafts if there are any."""
        return 1 / self.token.total_s

    @property
    def prefill_tok_per_s(self) -> float:
        """Prefill rate of a prompt of PROMPT_TOKENS."""
        return PROMPT_TOKENS / self.prefill.total_s

    @property
    def request_s(self) -> float:
        """Duration of a request with PROMPT_TOKENS prompt tokens and ANSWER_TOKENS new tokens."""
        return self.prefill.total_s + ANSWER_TOKENS / self.best_tok_per_s

    @property
    def backend(self) -> str:
        """MLX's backend, or a dash for a single host."""
        return self.link.backend if self.link else "-"


@dataclass(frozen=True)
class Plan:
    """All options for a model on some machines.

    Args:
        shape: the model.
        machines: all machines.
        context: requested context, in tokens.
        is_fast_sync: whether the fast fence is used.
        options: options that could be predicted, the fastest first.
        notes: reasons why other options could not be predicted.
        draft: draft model; None without one.
        expert_memory: memory for routed experts on each rank.
    """

    shape: ModelShape
    machines: tuple[Machine, ...]
    context: int
    is_fast_sync: bool
    options: tuple[Option, ...]
    notes: tuple[str, ...] = ()
    draft: DraftShape | None = None
    expert_memory: ExpertMemory = AUTO

    @property
    def first_token_prompt(self) -> int:
        """Length of the prompt of `first_token_s`."""
        return _first_prompt(self.shape)

    @property
    def choice(self) -> Option | None:
        """The best option that fits; None if none does."""
        return best_of([option for option in self.options if option.fits != "no"])


def best_of(options: Sequence[Option]) -> Option | None:
    """Return the fastest option; a pipeline only if it is faster by PIPELINE_MARGIN."""
    fastest = min(options, key=lambda option: option.request_s, default=None)
    if fastest is None or fastest.strategy != "pipeline":
        return fastest
    others = [option for option in options if option.strategy != "pipeline"]
    other = min(others, key=lambda option: option.request_s, default=fastest)
    return other if other.request_s <= fastest.request_s * (1 + PIPELINE_MARGIN) else fastest


def make_plan(
    shape: ModelShape,
    machines: Sequence[Machine],
    links: Sequence[LinkProfile],
    context: int,
    *,
    is_fast_sync: bool = False,
    draft: DraftShape | None = None,
    expert_memory: ExpertMemory = AUTO,
    constants: Constants = FITTED,
) -> Plan:
    """Compare all options.

    Args:
        shape: the model.
        machines: the hosts; options with each kind of host alone and with only the largest 2, 3, ... are included.
        links: possible links between them.
        context: number of tokens to have room for; decode is predicted at its end.
        is_fast_sync: whether MLX_METAL_FAST_SYNCH=1 is set.
        draft: draft model; None without one.
        expert_memory: memory for routed experts on each rank.
        constants: fitted constants.
    """
    notes: dict[str, None] = {}
    options: list[Option] = []
    fence_s = FAST_FENCE_S if is_fast_sync else FENCE_S
    for strategy, shares, hosts, link in _candidates(machines, links):
        if problem := _chip_problem(hosts, strategy) or (link and _link_problem(hosts, link)):
            notes[problem] = None
            continue
        placement = strategy_by_memory(strategy, hosts, shape, draft) if shares == "by memory" else strategy
        try:
            portions = make_portions(placement, shape, len(hosts), KIMI_MLX.slices_head)
        except PlacementError as error:
            notes[f"{strategy} on {len(hosts)}: {error.message}"] = None
            continue
        setup = Setup(shape, strategy, hosts, portions, link, KIMI_MLX, fence_s, constants, draft)
        options.append(_option(setup, placement, context, expert_memory))
    options.sort(key=lambda option: option.request_s)
    return Plan(shape, tuple(machines), context, is_fast_sync, tuple(options), tuple(notes), draft, expert_memory)


def _candidates(
    machines: Sequence[Machine], links: Sequence[LinkProfile]
) -> Iterator[tuple[Strategy, Shares, list[Machine], LinkProfile | None]]:
    """Yield each kind of host alone, then the largest two, and so on, for each strategy and link.

    Of hosts with equal memory those with more bandwidth come first.
    """
    largest = sorted(machines, key=lambda host: (-host.raised_gpu_bytes, -host.chip.bandwidth_gb_per_s))
    kinds: list[Machine] = []
    for machine in largest:
        if (kind := replace(machine, name="")) not in kinds:
            kinds.append(kind)
            yield "single", "even", [machine], None
    for count in range(2, len(largest) + 1):
        hosts = [machine for machine in machines if machine in largest[:count]]
        is_uniform = len({machine.memory_bytes for machine in hosts}) == 1
        for strategy in STRATEGIES:
            for link in links:
                yield strategy, "even", hosts, link
                if not is_uniform:
                    yield strategy, "by memory", hosts, link


def strategy_by_memory(
    strategy: Strategy, machines: Sequence[Machine], shape: ModelShape, draft: DraftShape | None = None
) -> str:
    """Return the strategy with a weight per machine (thousandths) that fills all machines equally."""
    free = [_free_bytes(machine, strategy, shape) for machine in machines]
    if draft is not None:
        free[0] = max(free[0] - draft.memory.total_bytes(min(CONTEXT_TOKENS, shape.context_tokens)), 1.0)
    weights = [max(1, round(1000 * host_free / sum(free))) for host_free in free]
    return normalize_strategy(":".join([strategy, *map(str, weights)]), len(machines))


def _free_bytes(machine: Machine, strategy: Strategy, shape: ModelShape) -> float:
    """Return the memory that a host has left for its share; at least 1.

    Subtracts what every rank needs regardless of its share: the replicated weights, the cache and the workspace. Uses
    CONTEXT_TOKENS, so that shares do not depend on the requested context.
    """
    if strategy == "pipeline":
        base = Portion(0, 0, embedding=0, head=0)
    else:
        heads = 0 if strategy == "tensor" else 1
        base = Portion(shape.layers, shape.moe_layers, head=0, heads=heads, expert_rows=0, shared_rows=0, dense_rows=0)
    base_bytes = host_memory(machine, base, shape, KIMI_MLX, min(CONTEXT_TOKENS, shape.context_tokens)).needed_bytes
    return max(machine.raised_gpu_bytes - base_bytes, 1.0)


def _chip_problem(hosts: Sequence[Machine], strategy: Strategy) -> str | None:
    """Return why these hosts cannot use the strategy; None if they can.

    MLX chooses kernels by chip, and each rounds differently. All strategies for several ranks except pipeline compute
    the router on every rank, and ranks that round differently choose different experts.
    """
    chips = {machine.chip.chip for machine in hosts if machine.is_known}
    if strategy in ("single", "pipeline") or len(chips) < 2:
        return None
    return f"only pipeline with {' and '.join(sorted(chips))}: different chips round differently"


def _link_problem(hosts: Sequence[Machine], link: LinkProfile) -> str | None:
    """Return why these hosts cannot use the link; None if they can."""
    if link.backend != "jaccl":
        return None
    without_rdma = [machine.name for machine in hosts if not machine.chip.has_rdma]
    if without_rdma:
        return f"no jaccl with {', '.join(without_rdma)}: RDMA needs Thunderbolt 5"
    too_few_ports = [machine.name for machine in hosts if machine.chip.thunderbolt_ports < len(hosts) - 1]
    if too_few_ports:
        ports = len(hosts) - 1
        return f"no jaccl for {len(hosts)} hosts: a cable between every two needs {ports} ports ({too_few_ports[0]})"
    return None


def _option(setup: Setup, placement: str, context: int, expert_memory: ExpertMemory) -> Option:
    """Predict an option: with all experts in memory, else with some read from the SSD if the setting says so."""
    resident = None if expert_memory.mode == "size" else _predict(setup, placement, context)
    if resident is not None and (resident.fits != "no" or expert_memory.mode == "all"):
        return resident
    limits: tuple[Limit, ...] = ("default", "raised")
    for limit in (*limits, "none") if expert_memory.mode == "size" else limits:
        streamed = _streamed(setup, context, expert_memory, limit)
        if streamed is not None:
            raised = streamed if limit == "none" else _streamed(setup, context, expert_memory, "raised") or setup
            return _predict(streamed, placement, context, _details(streamed, raised, context))
    return resident or _predict(setup, placement, context)


def _streamed(setup: Setup, context: int, expert_memory: ExpertMemory, limit: Limit) -> Setup | None:
    """Return the setup with experts that are read from the SSD; None if all are in memory, or the rest does not fit."""
    draft = None if setup.draft is None else setup.draft.memory
    streaming = plan_streaming(setup.machines, setup.portions, setup.shape, context, expert_memory, draft, limit)
    return None if streaming is None else replace(setup, streaming=streaming)


def _details(streamed: Setup, raised: Setup, context: int) -> StreamedOption:
    """Return the details of a setup with experts on the SSD; `raised` is the same with the GPU's limit raised."""
    shape, streaming = streamed.shape, streamed.streaming
    assert streaming is not None
    even = uniform(streaming)
    return StreamedOption(
        streaming,
        streaming.hit_rate(shape),
        streaming.token_read_bytes(shape),
        even.hit_rate(shape),
        1 / decode(replace(streamed, streaming=even), context).total_s,
        1.0 if raised.streaming is None else raised.streaming.kept_share,
        1 / decode(raised, context).total_s,
    )


def _predict(setup: Setup, placement: str, context: int, experts: StreamedOption | None = None) -> Option:
    draft = None if setup.draft is None else setup.draft.memory
    parts = (setup.machines, setup.portions, setup.shape, setup.engine)
    longest = [
        longest_context(*parts, is_raised=is_raised, draft=draft, streaming=setup.streaming)
        for is_raised in (False, True)
    ]
    memory = memory_by_rank(*parts, context, draft, setup.streaming)
    return Option(
        setup.strategy,
        placement,
        tuple(machine.name for machine in setup.machines),
        setup.link,
        memory,
        longest[0],
        longest[1],
        decode(setup, context),
        prefill(setup, PROMPT_TOKENS),
        prefill(setup, _first_prompt(setup.shape)).total_s,
        max(host.weights_bytes / machine.ssd.bytes_per_s for host, machine in zip(memory, setup.machines, strict=True)),
        decode_with_draft(setup, context),
        experts,
    )


def _first_prompt(shape: ModelShape) -> int:
    return min(FIRST_TOKEN_PROMPT, shape.context_tokens)


def fits_with_auto(plan: Plan, links: Sequence[LinkProfile]) -> bool:
    """Return whether a plan with a set size of memory for experts would fit with `--expert-memory auto`."""
    if plan.expert_memory.mode != "size":
        return False
    automatic = make_plan(plan.shape, plan.machines, links, plan.context, draft=plan.draft)
    return automatic.choice is not None


def sufficient_number(plan: Plan, machine: Machine, links: Sequence[LinkProfile]) -> int | None:
    """Return the smallest number of machines like `machine`, two or more, on which a plan's model fits.

    None if MAX_HOSTS are not enough.
    """
    for number in range(2, MAX_HOSTS + 1):
        machines = [replace(machine, name=f"{machine.chip.chip} #{index + 1}") for index in range(number)]
        sufficient = make_plan(
            plan.shape, machines, links or [TCP], plan.context, draft=plan.draft, expert_memory=plan.expert_memory
        )
        if sufficient.choice is not None:
            return number
    return None
