"""A plan, its costs and the backtest for people, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.table import Table

from kimi_mlx.planner.backtest import TYPICAL_ERROR, Comparison, left_out, median_error
from kimi_mlx.planner.constants import FITTED
from kimi_mlx.planner.cost import Cost, CostAssumptions
from kimi_mlx.planner.memory import HostMemory
from kimi_mlx.planner.reasons import rejection_reason
from kimi_mlx.planner.search import ANSWER_TOKENS, PROMPT_TOKENS, Option, Plan
from kimi_mlx.units import GB, GIB, format_bytes, format_context

COLUMNS = ("strategy", "hosts", "backend", "GB/host", "fits", "context", "prefill", "decode")
RIGHT = {"hosts", "GB/host", "context", "prefill", "decode"}

NOTEWORTHY = 0.1
"""The part of a token's time from which on faster fences are worth a word."""

Part = str | Table


def plan_report(plan: Plan) -> Iterator[Part]:
    """All that is to be printed of a plan."""
    names = ", ".join(machine.name for machine in plan.machines)
    yield f"{plan.shape.name}: {format_bytes(plan.shape.weights_bytes)} of weights, {plan.context:,} tokens of context"
    yield f"on {names}{', with the fast fence' if plan.is_fast_sync else ''}"
    links = dict.fromkeys(option.link for option in plan.options if option.link is not None)
    if links:
        figures = [f"{each.name} ({each.hop_s * 1e6:.0f} us a hop, {each.bytes_per_s / GB:.2g} GB/s)" for each in links]
        yield f"over {', '.join(figures)}"
    yield ""
    shown = shown_options(plan)
    yield _table(plan, shown)
    yield ""
    yield from choice_lines(plan)
    lost = [(option, rejection_reason(option, plan)) for option in shown]
    if any(why for _, why in lost):
        yield ""
        yield "Why not the others:"
        yield from (f"  {_name(option)}: {why}" for option, why in lost if why)
    yield from (f"  {note}" for note in plan.notes)
    if any(option.shares != "even" for option in shown):
        weights = dict.fromkeys(option.placement for option in shown if option.shares != "even")
        yield f"  * shares in proportion to the hosts' memory: `--strategy {next(iter(weights))}`; the others are even."
    yield ""
    yield (
        f"Predictions, not measurements. decode: tok/s of one sequence at the end of that context; prefill: tok/s of "
        f"{PROMPT_TOKENS} tokens. Options are compared by a prompt of {PROMPT_TOKENS} and an answer of {ANSWER_TOKENS} "
        f"tokens; less than {100 * TYPICAL_ERROR:.0f} % between two means little, for that is the median error of the "
        "method (--backtest, docs/planner.md)."
    )


def shown_options(plan: Plan) -> list[Option]:
    """Those with all machines, and the best of each smaller number; what does not fit comes last.

    Of what does not fit one backend is enough: memory does not depend on it.
    """
    found: list[Option] = []
    seen = {len(plan.machines)}
    too_large: set[tuple[object, ...]] = set()
    for option in sorted(plan.options, key=lambda option: option.fits == "no"):
        count, placed = len(option.hosts), (option.placement, option.hosts)
        is_wanted = count == len(plan.machines) or count not in seen or option is plan.choice
        if is_wanted and placed not in too_large:
            found.append(option)
        seen.add(count)
        if option.fits == "no":
            too_large.add(placed)
    return found


def choice_lines(plan: Plan) -> Iterator[str]:
    """The choice in a sentence, what its token is made of, and its memory."""
    choice = plan.choice
    if choice is None:
        yield "Choice: none, it does not fit."
        return
    yield f"Choice: {_name(choice)}: {choice.decode_tok_per_s:.1f} tok/s."
    parts = choice.decode
    yield (
        f"  A token takes {parts.total_s * 1e3:.1f} ms: weights {parts.read_s * 1e3:.1f}, attention "
        f"{parts.compute_s * 1e3:.1f}, kernels {parts.kernels_s * 1e3:.1f}, fences {parts.fences_s * 1e3:.1f}, "
        f"link {parts.link_s * 1e3:.1f}."
    )
    if not plan.is_fast_sync and parts.fences_s > NOTEWORTHY * parts.total_s:
        yield "  `--fast-sync` has faster fences, but can wedge a GPU, so that its Mac must be restarted."
    yield from _memory_lines(choice.memory)


def _memory_lines(memory: Sequence[HostMemory]) -> Iterator[str]:
    """Memory of each host; equal ones in one line."""
    names: dict[HostMemory, list[str]] = {}
    for each in memory:
        names.setdefault(replace(each, host=""), []).append(each.host)
    for each, hosts in names.items():
        yield (
            f"  {', '.join(hosts)}: {each.needed_bytes / GB:.1f} GB (weights {each.weights_bytes / GB:.1f}, cache "
            f"{each.cache_bytes / GB:.1f}, prefill {each.workspace_bytes / GB:.1f}); a GPU may wire "
            f"{each.gpu_bytes / GB:.1f} GB there, raised {each.raised_gpu_bytes / GB:.1f}."
        )
        if each.needed_bytes > each.gpu_bytes:
            wanted = -(-each.needed_bytes // GIB) * GIB // 1024**2
            yield f"    until its next restart: sudo sysctl iogpu.wired_limit_mb={wanted}"


def _table(plan: Plan, shown: Sequence[Option]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in COLUMNS:
        table.add_column(header, justify="right" if header in RIGHT else "left", no_wrap=True)
    for option in shown:
        longest = max(option.longest_context, option.longest_context_raised if option.fits == "raised" else 0)
        cells = [
            f"{option.strategy}{_mark(option)}",
            str(len(option.hosts)),
            option.backend,
            f"{max(each.needed_bytes for each in option.memory) / GB:.1f}",
            option.fits,
            format_context(longest) if longest else "-",
            f"{option.prefill_tok_per_s:.0f}",
            f"{option.decode_tok_per_s:.1f}",
        ]
        table.add_row(*cells, style="bold" if option is plan.choice else "dim" if option.fits == "no" else None)
    return table


def _name(option: Option) -> str:
    where = "one host" if option.link is None else f"{len(option.hosts)} hosts, {option.backend}"
    return f"{option.strategy}{_mark(option)}, {where}"


def _mark(option: Option) -> str:
    return "" if option.shares == "even" else "*"


def cost_lines(cost: Cost, assumptions: CostAssumptions) -> Iterator[str]:
    """What a million tokens cost."""
    yield ""
    yield (
        f"Cost: machines {cost.price:,.0f} over {assumptions.years:g} years, {cost.watts:.0f} W at work, "
        f"{cost.watts_idle:.0f} W idle, {assumptions.electricity:g} a kWh."
    )
    if not cost.is_possible:
        yield f"  {assumptions.tokens_a_day:,.0f} tokens would take {cost.hours_a_day:.1f} hours: more than a day has."
        return
    yield (
        f"  {assumptions.tokens_a_day:,.0f} tokens a day take {cost.hours_a_day:.1f} hours: {cost.per_million:,.2f} a "
        f"million, of which {cost.electricity_per_million:,.2f} are electricity at work. Electricity a month, idle "
        f"hours included: {cost.electricity_a_month:,.2f}."
    )
    if assumptions.subscription is not None:
        when = "never" if cost.break_even_months is None else f"after {cost.break_even_months:,.0f} months"
        yield f"  Against a subscription of {assumptions.subscription:g} a month: break-even {when}."
    yield "  Prices are the table's, in US dollars, unless --price says otherwise; prompts are not counted."


def backtest_report(comparisons: Sequence[Comparison]) -> Iterator[Part]:
    """All comparisons, the medians, and what was left out."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in ("published row", "what", "published", "predicted", "error", ""):
        table.add_column(header, justify="right" if header in ("published", "predicted", "error") else "left")
    for each in comparisons:
        marks = "fitted" if each.row.fit else "repeats" if each.row.is_repeat else ""
        numbers = (f"{each.published:.1f}", f"{each.predicted:.1f}", f"{100 * each.error:+.0f} %")
        table.add_row(each.row.id, each.metric, *numbers, marks)
    yield table
    yield ""
    others = [each for each in comparisons if not each.row.fit]
    new = [each for each in comparisons if each.is_new]
    yield (
        f"Median error {100 * median_error(comparisons):.1f} % of {len(comparisons)}; {100 * median_error(others):.1f} "
        f"% of the {len(others)} that were not fitted; {100 * median_error(new):.1f} % of the {len(new)} that do not "
        "repeat the set-up of a fitted one either. tok/s."
    )
    yield (
        f"Fitted: {FITTED.bandwidth_share:g} of the bandwidth, {FITTED.kernel_s * 1e6:g} us a kernel, "
        f"{FITTED.compute_share:g} of the fp16 rate. (u): the figure is second-hand."
    )
    yield ""
    yield "Left out:"
    yield from (f"  {what}: {why}" for what, why in left_out())
