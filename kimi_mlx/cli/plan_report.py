"""Text of a plan, its cost and the backtest, in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rich.table import Table

from kimi_mlx.cli.output import stdout
from kimi_mlx.cli.plan_bars import BAR, legend, memory_bar, time_bars
from kimi_mlx.planner.backtest import TYPICAL_ERROR, Comparison, left_out, median_error
from kimi_mlx.planner.constants import FITTED
from kimi_mlx.planner.cost import Cost, CostAssumptions
from kimi_mlx.planner.links import LinkProfile
from kimi_mlx.planner.machines import Machine, name_of_kind
from kimi_mlx.planner.memory import HostMemory
from kimi_mlx.planner.reasons import rejection_reason
from kimi_mlx.planner.search import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    Option,
    Plan,
    fits_with_auto,
    make_plan,
    sufficient_number,
)
from kimi_mlx.sizing.hosts import MAX_HOSTS
from kimi_mlx.units import GB, GIB, format_context, format_count, format_duration, format_gib

COLUMNS = ("strategy", "hosts", "backend", "GiB/host", "fits", "context", "prefill", "decode")
DRAFT_COLUMN = "drafts"
"""Column of the decode rate with a draft model."""
RIGHT = {"hosts", "GiB/host", "context", "prefill", "decode", DRAFT_COLUMN}

NOTEWORTHY = 0.1
"""Share of a token's time from which the report mentions faster fences."""

OPTIONAL = ("context", "GiB/host", "backend", "prefill")
"""Columns that narrow terminals leave out, the first one first."""

GAP = 2
"""Spaces between two columns."""

BESIDE_BAR = 26
"""Characters beside a bar: indentation, name and value."""

Part = str | Table


def print_parts(parts: Iterable[Part]) -> None:
    """Print parts of a report on stdout; text is wrapped, and keeps its indentation."""
    for part in parts:
        if isinstance(part, str):
            indent = " " * (len(part) - len(part.lstrip()) + 2) if part.startswith(" ") else ""
            part = textwrap.fill(part, stdout.width, subsequent_indent=indent, break_long_words=False)
        stdout.print(part, markup=False, soft_wrap=isinstance(part, str))


def number_that_fits(plan: Plan, links: Sequence[LinkProfile]) -> str:
    """Return what makes a model fit that does not: `--expert-memory auto`, or this number of the largest machine."""
    if fits_with_auto(plan, links):
        return "Does not fit with this `--expert-memory`. With `auto` it does."
    largest = max(plan.machines, key=lambda machine: machine.memory_bytes)
    name = name_of_kind(largest)
    number = sufficient_number(plan, largest, links)
    if number is None:
        return f"Does not fit. Even {MAX_HOSTS} x {name} would not be enough."
    return f"Does not fit. {number} x {name} would be enough."


def better_without_draft(plan: Plan, links: Sequence[LinkProfile]) -> str | None:
    """Return the choice without the draft model if that is faster: the draft model takes memory from experts."""
    if plan.draft is None:
        return None
    without = make_plan(
        plan.shape,
        plan.machines,
        links,
        plan.context,
        is_fast_sync=plan.is_fast_sync,
        expert_memory=plan.expert_memory,
    ).choice
    if without is None or (plan.choice is not None and without.request_s >= plan.choice.request_s):
        return None
    rate = _decode_rate(without.decode_tok_per_s)
    return f"Faster without the draft model, which takes memory: {_name(without)}: {rate} tok/s."


def _with_bandwidth(machine: Machine) -> str:
    """Return the name of a machine and its memory bandwidth, unless the name has it or it is not known."""
    if not machine.is_known or "GB/s" in machine.name:
        return machine.name
    return f"{machine.name} ({machine.chip.bandwidth_gb_per_s:g} GB/s)"


def plan_report(plan: Plan) -> Iterator[Part]:
    """Yield the report of a plan, part by part."""
    names = ", ".join(map(_with_bandwidth, plan.machines))
    context = "1 token" if plan.context == 1 else f"{plan.context:,} tokens"
    yield f"{plan.shape.name}: {format_gib(plan.shape.weights_bytes)} of weights, {context} of context"
    yield f"on {names}{', with fast synchronisation' if plan.is_fast_sync else ''}"
    links = dict.fromkeys(option.link for option in plan.options if option.link is not None)
    if links:
        speeds = [
            f"{link.name} ({link.hop_s * 1e6:.0f} us per hop, {link.bytes_per_s / GB:.2g} GB/s)" for link in links
        ]
        yield f"over {', '.join(speeds)}"
    if plan.draft is not None:
        yield f"with {plan.draft.name}: {plan.draft.tokens_per_step:g} tokens per step ({plan.draft.source})"
    yield ""
    shown = shown_options(plan)
    yield _table(plan, shown)
    yield ""
    yield from choice_lines(plan)
    rejected = [(option, rejection_reason(option, plan)) for option in shown]
    if any(reason for _, reason in rejected):
        yield ""
        yield "Why not the others:"
        yield from (f"  {_name(option)}: {reason}" for option, reason in rejected if reason)
    yield from (f"  {note}" for note in plan.notes)
    if any(option.shares != "even" for option in shown):
        yield "  * split in proportion to the hosts' memory; others are even."
    yield ""
    yield (
        f"Predictions, not measurements. decode: tok/s of one sequence at the end of that context"
        f"{', drafts: the same with the draft model' if plan.draft else ''}; prefill: tok/s of "
        f"{PROMPT_TOKENS} tokens. Options are compared by the time for a prompt of {PROMPT_TOKENS} and an answer of "
        f"{ANSWER_TOKENS} tokens. Differences below {100 * TYPICAL_ERROR:.0f} %, the median error of the method, mean "
        "little (--backtest, docs/planner.md)."
    )


def shown_options(plan: Plan) -> list[Option]:
    """Return the options on all machines and the best one on each smaller number: the choice first, what does not fit
    last.

    Options that do not fit are listed for one backend only, because memory does not depend on it.
    """
    shown: list[Option] = []
    seen = {len(plan.machines)}
    too_large: set[tuple[object, ...]] = set()
    for option in sorted(plan.options, key=lambda option: (option is not plan.choice, option.fits == "no")):
        count, placed = len(option.hosts), (option.placement, option.hosts)
        is_shown = count == len(plan.machines) or count not in seen or option is plan.choice
        if is_shown and placed not in too_large:
            shown.append(option)
        seen.add(count)
        if option.fits == "no":
            too_large.add(placed)
    return shown


def choice_lines(plan: Plan) -> Iterator[str]:
    """Yield the choice, the times that make up one of its tokens, its memory, and its times to load and to begin."""
    choice = plan.choice
    if choice is None:
        yield "Choice: none, the model does not fit."
        return
    drafted = "" if choice.drafted is None else f", {_decode_rate(choice.drafted.tok_per_s)} with drafts"
    where = f" ({choice.hosts[0]})" if choice.link is None and len(plan.machines) > 1 else ""
    yield f"Choice: {_name(choice)}{where}: {_decode_rate(choice.decode_tok_per_s)} tok/s{drafted}."
    if choice.link is not None:
        yield f"  `launch` takes it as `--strategy {choice.placement}`."
    parts = choice.decode
    yield f"  A token takes {parts.total_s * 1e3:.1f} ms:"
    yield from time_bars(parts, bar_width=_bar_width())
    yield from _draft_lines(plan, choice)
    yield from _expert_lines(plan, choice)
    if not plan.is_fast_sync and parts.fences_s > NOTEWORTHY * parts.total_s:
        yield "  `--fast-sync` makes fences faster, but may hang the GPU and require a restart."
    yield from _memory_lines(choice.memory)
    yield from _start_lines(plan, choice)


def _draft_lines(plan: Plan, choice: Option) -> Iterator[str]:
    """Yield the step with drafts, or why nothing is drafted."""
    if plan.draft is None:
        return
    drafted = choice.drafted
    if drafted is None:
        yield "  Drafts would not pay: a step of several tokens takes too long."
        return
    yield (
        f"  A step with {format_count(drafted.drafted, 'draft token')} takes {drafted.step.total_s * 1e3:.1f} ms and "
        f"gives {drafted.tokens_per_step:.2f} tokens, {drafted.tok_per_s / choice.decode_tok_per_s:.2f} times as fast:"
    )
    yield from time_bars(drafted.step, bar_width=_bar_width(), has_products=True)


def _expert_lines(plan: Plan, choice: Option) -> Iterator[str]:
    """Yield which experts are in memory, what is read from the SSD, and what that assumes."""
    experts = choice.experts
    if experts is None:
        return
    streaming, machines = experts.streaming, [machine for machine in plan.machines if machine.name in choice.hosts]
    rates = dict.fromkeys(f"{machine.ssd.bytes_per_s / GB:g} GB/s ({machine.ssd.source})" for machine in machines)
    each = "the SSD reads" if len(machines) == 1 else "each SSD reads its host's part, at"
    yield (
        f"  {_percent(streaming.kept_share)} of the experts are in memory ({format_gib(streaming.kept_bytes)} of "
        f"{format_gib(streaming.all_bytes)}). A token reads {experts.token_read_bytes / GB:.2f} GB from the SSD: "
        f"{each} {' and '.join(rates)}."
    )
    yield (
        f"  Assumed: {_percent(experts.hit_rate)} of the chosen experts are in memory, because popularity follows "
        f"Zipf's law with exponent {streaming.exponent:g}. If all were equally popular: "
        f"{_percent(experts.uniform_hit_rate)}, {experts.uniform_tok_per_s:.2g} tok/s (docs/streaming.md)."
    )
    yield (
        f"  A chunk of a prompt reads nearly all other experts once, whatever its length: chunks have up to "
        f"{streaming.chunk:,} tokens."
    )
    if experts.raised_kept_share > 1.02 * streaming.kept_share:
        yield (
            f"  With the GPU's limit raised: {_percent(experts.raised_kept_share)} in memory, "
            f"{experts.raised_tok_per_s:.3g} tok/s."
        )


def _start_lines(plan: Plan, choice: Option) -> Iterator[str]:
    """Yield the time to load the weights, and to the first token of a long prompt."""
    machines = [machine for machine in plan.machines if machine.name in choice.hosts]
    chips = [machine.chip for machine in machines]
    rates = dict.fromkeys(f"{machine.ssd.bytes_per_s / GB:g} GB/s ({machine.ssd.source})" for machine in machines)
    yield (
        f"  Loading takes {format_duration(choice.load_s)} or more, if the SSD reads {' and '.join(rates)}. The first "
        f"token of a prompt of {plan.first_token_prompt:,} comes after {format_duration(choice.first_token_s)}."
    )
    if any(chip.unverified and "tflops" in chip.unverified for chip in chips):
        yield "  The fp16 rate of this chip is not measured, so prefill may be far off (docs/planner.md)."


def _memory_lines(memory: Sequence[HostMemory]) -> Iterator[str]:
    """Yield the memory of each host; equal hosts share a line."""
    yield legend(any(share.draft_bytes for share in memory), any(share.kept_share < 1 for share in memory))
    names: dict[HostMemory, list[str]] = {}
    for share in memory:
        names.setdefault(replace(share, host=""), []).append(share.host)
    for share, hosts in names.items():
        draft = f", draft model {share.draft_bytes / GIB:.1f}" if share.draft_bytes else ""
        yield (
            f"  {', '.join(hosts)}: {format_gib(share.needed_bytes)} (weights {share.weights_bytes / GIB:.1f}{draft}, "
            f"cache {share.cache_bytes / GIB:.1f}, prefill {share.workspace_bytes / GIB:.1f}); GPU limit "
            f"{format_gib(share.gpu_bytes)} by default, {format_gib(share.raised_gpu_bytes)} if raised."
        )
        yield memory_bar(share, _bar_width())
        if share.needed_bytes > share.gpu_bytes:
            limit_mb = -(-share.needed_bytes // GIB) * GIB // 1024**2
            yield f"    raise it until the next restart: sudo sysctl iogpu.wired_limit_mb={limit_mb}"


def _table(plan: Plan, shown: Sequence[Option]) -> Table:
    headers = [*COLUMNS, *([DRAFT_COLUMN] if plan.draft else [])]
    rows = [dict(zip(headers, _cells(option, has_drafts=plan.draft is not None), strict=True)) for option in shown]
    widths = {header: max(len(row[header]) for row in (*rows, {header: header})) for header in headers}
    for header in OPTIONAL:
        if sum(widths.values()) + GAP * (len(widths) - 1) > stdout.width:
            del widths[header]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for header in widths:
        table.add_column(header, justify="right" if header in RIGHT else "left", no_wrap=True)
    for option, row in zip(shown, rows, strict=True):
        style = "bold" if option is plan.choice else "dim" if option.fits == "no" else None
        table.add_row(*(row[header] for header in widths), style=style)
    return table


def _cells(option: Option, *, has_drafts: bool) -> list[str]:
    longest = max(option.longest_context, option.longest_context_raised if option.fits == "raised" else 0)
    return [
        f"{option.strategy}{_mark(option)}",
        str(len(option.hosts)),
        option.backend,
        f"{max(share.needed_bytes for share in option.memory) / GIB:.1f}",
        _fits(option),
        format_context(longest) if longest and not (option.fits == "no" and option.experts) else "-",
        *_speeds(option, has_drafts=has_drafts),
    ]


def _bar_width() -> int:
    """Return the width of the longest bar on this terminal."""
    return max(min(BAR, stdout.width - BESIDE_BAR), 1)


def _speeds(option: Option, *, has_drafts: bool) -> list[str]:
    """Return the cells of prefill and decode. What does not fit has no speed."""
    rates = [f"{option.prefill_tok_per_s:.0f}", _decode_rate(option.decode_tok_per_s)]
    if has_drafts:
        rates.append("off" if option.drafted is None else _decode_rate(option.drafted.tok_per_s))
    return ["-"] * len(rates) if option.fits == "no" else rates


def _fits(option: Option) -> str:
    """Return whether an option fits; with the share of experts in memory if some are read from the SSD."""
    if option.fits != "ssd" or option.experts is None:
        return option.fits
    return f"ssd {_percent(option.experts.streaming.kept_share)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _decode_rate(tok_per_s: float) -> str:
    return f"{tok_per_s:.1f}" if tok_per_s >= 1 else f"{tok_per_s:.2f}"


def _name(option: Option) -> str:
    where = "one host" if option.link is None else f"{len(option.hosts)} hosts, {option.backend}"
    return f"{option.strategy}{_mark(option)}, {where}"


def _mark(option: Option) -> str:
    return "" if option.shares == "even" else "*"


def cost_lines(cost: Cost, assumptions: CostAssumptions) -> Iterator[str]:
    """Yield the cost of a million tokens."""
    yield ""
    yield (
        f"Cost: machines {cost.price:,.0f} over {assumptions.years:g} years, {cost.watts:.0f} W under load, "
        f"{cost.watts_idle:.0f} W idle, {assumptions.electricity:g} per kWh."
    )
    if not cost.is_possible:
        yield f"  {assumptions.tokens_a_day:,.0f} tokens a day would take {cost.hours_a_day:.1f} hours a day."
        return
    yield (
        f"  {assumptions.tokens_a_day:,.0f} tokens a day take {cost.hours_a_day:.1f} hours: {cost.per_million:,.2f} "
        f"per million, of which {cost.electricity_per_million:,.2f} for electricity under load. Electricity per month, "
        f"idle hours included: {cost.electricity_a_month:,.2f}."
    )
    if assumptions.subscription is not None:
        when = "never" if cost.break_even_months is None else f"after {cost.break_even_months:,.0f} months"
        yield f"  Compared with a subscription of {assumptions.subscription:g} per month: break-even {when}."
    yield "  Prices are in US dollars, from the planner's table unless --price is given; prompt tokens are not counted."


def backtest_report(comparisons: Sequence[Comparison]) -> Iterator[Part]:
    """Yield all comparisons, the median errors, and the published rows that are left out."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in ("published row", "metric", "published", "predicted", "error", ""):
        table.add_column(header, justify="right" if header in ("published", "predicted", "error") else "left")
    for comparison in comparisons:
        row = comparison.row
        mark = "fitted" if row.fit else "repeats" if row.is_repeat else "SSD" if comparison.is_streamed else ""
        values = (f"{comparison.published:.1f}", f"{comparison.predicted:.1f}", f"{100 * comparison.error:+.0f} %")
        table.add_row(row.id, comparison.metric, *values, mark)
    yield table
    yield ""
    resident = [comparison for comparison in comparisons if not comparison.is_streamed]
    streamed = [comparison for comparison in comparisons if comparison.is_streamed]
    others = [comparison for comparison in resident if not comparison.row.fit]
    new = [comparison for comparison in comparisons if comparison.is_new]
    yield (
        f"Median error: {100 * median_error(resident):.1f} % over all {len(resident)} rows with the model in memory; "
        f"{100 * median_error(others):.1f} % over the {len(others)} that were not fitted; "
        f"{100 * median_error(new):.1f} % over the {len(new)} that do not repeat a fitted configuration either. Values "
        "are in tok/s."
    )
    yield (
        f"With experts on the SSD (SSD): {100 * median_error(streamed):.0f} % over {len(streamed)}. They depend on "
        "assumed hits, and on other programs (docs/streaming.md)."
    )
    yield (
        f"Fitted: {FITTED.bandwidth_share:g} of the bandwidth, {FITTED.kernel_s * 1e6:g} us per kernel, "
        f"{FITTED.compute_share:g} of the fp16 rate. (u): the number is second-hand."
    )
    yield ""
    yield "Left out:"
    yield from (f"  {row}: {reason}" for row, reason in left_out())
