"""Report of the doctor, as text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kimi_mlx.cluster.doctor.doctor import Diagnosis
from kimi_mlx.cluster.doctor.memory_need import ModelNeed
from kimi_mlx.cluster.doctor.self_test import SelfTest, Timing
from kimi_mlx.cluster.hosts.findings import Finding, State
from kimi_mlx.parallel.all_reduce_choice import AllReduceChoice
from kimi_mlx.settings import Settings
from kimi_mlx.sizing.ssd import SsdSpeed
from kimi_mlx.units import GB, format_bytes

SYMBOLS: dict[State, str] = {"ok": "✓ ok", "warning": "! warning", "problem": "✗ problem"}
STYLES: dict[State, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}

STATE_WIDTH, CHECK_WIDTH = 10, 12
"""Widths of the first two columns; the message gets the rest."""


def report(
    diagnosis: Diagnosis, need: ModelNeed, option: str, width: int, is_verbose: bool = False, *, is_launch: bool = False
) -> Iterator[RenderableType]:
    """Yield the report, part by part; a part of type str must not be wrapped.

    Args:
        diagnosis: diagnosis of the hosts.
        need: the model's name and memory.
        option: option that names the hosts in the next command, such as `--hosts a,b`; empty for this machine only.
        width: width of the terminal.
        is_verbose: whether to show each check that passed and each size of the self-test.
        is_launch: whether `launch` prints the report; then its command is the next step.
    """
    for host in _groups(diagnosis):
        yield Text("this machine" if not option else host, style="bold")
        yield from _group([finding for finding in diagnosis.findings if finding.host == host], width, is_verbose)
        yield ""
    if diagnosis.ssds:
        yield ssd_table(diagnosis.ssds)
        yield ""
    if diagnosis.links:
        yield link_table(diagnosis)
        yield ""
    if diagnosis.self_test is not None and diagnosis.self_test.timings and len(diagnosis.facts) > 1:
        yield timing_table(diagnosis.self_test) if is_verbose else Text(timing_line(diagnosis.self_test))
        if (choice := diagnosis.self_test.sums) is not None:
            text = str(choice)
            yield Text(f"{text[0].upper()}{text[1:]}.")
            if is_verbose:
                yield all_reduce_table(choice)
        yield ""
    if is_launch and not diagnosis.has_problem:
        return
    advice, command = next_step(diagnosis, need, option, is_launch=is_launch)
    yield Text(advice, style="bold")
    if command:
        yield f"  {command}"


def _groups(diagnosis: Diagnosis) -> list[str]:
    """Return the hosts in their order, then the groups of hosts that findings are about."""
    named = {finding.host for finding in diagnosis.findings}
    several = [host for host in dict.fromkeys(f.host for f in diagnosis.findings) if host not in diagnosis.hosts]
    return [*(host for host in diagnosis.hosts if host in named), *several]


def _group(findings: Sequence[Finding], width: int, is_verbose: bool) -> Iterator[RenderableType]:
    """Yield the findings of one host; checks that passed share a line unless is_verbose."""
    for is_ok, part in groupby(sorted(findings, key=lambda f: f.state == "ok"), key=lambda f: f.state == "ok"):
        same_state = list(part)
        if is_ok and not is_verbose and len(same_state) > 1:
            checks = ", ".join(dict.fromkeys(finding.check for finding in same_state))
            yield _row("ok", f"{len(same_state)} checks", checks)
            continue
        for finding in same_state:
            yield _row(finding.state, finding.check, finding.message)
            yield from remedy_lines(finding.remedy or "", width)


def _row(state: State, check: str, message: str) -> Table:
    row = Table.grid(expand=True)
    row.add_column(width=STATE_WIDTH, no_wrap=True)
    row.add_column(width=CHECK_WIDTH, no_wrap=True)
    row.add_column(ratio=1, overflow="fold")
    row.add_row(Text(SYMBOLS[state], style=STYLES[state]), check, Text(message))
    return row


def remedy_lines(text: str, width: int) -> list[str]:
    """Wrap a remedy; a command that is longer than a line gets a line of its own, uncut, so that it can be copied."""
    indent = "  "
    pieces = re.split(r"(`[^`]+`)", text)
    lines: list[str] = []
    for is_long, part in groupby(pieces, key=lambda piece: piece.startswith("`") and len(piece) + len(indent) > width):
        if is_long:
            lines += [piece.strip("`") for piece in part]
            continue
        words = "".join(part).strip(" ;,")
        # do not break lines at the spaces of a command
        unbroken = re.sub(r"`[^`]+`", lambda match: match[0].replace(" ", "\0"), words)
        wrapped = textwrap.wrap(
            unbroken,
            width,
            initial_indent=indent if lines else f"{indent}→ ",
            subsequent_indent=indent * 2,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [line.replace("\0", " ") for line in wrapped]
    return lines


def ssd_table(ssds: Mapping[str, SsdSpeed]) -> Table:
    """Return a table of the measured SSDs: the rate for each number of reads at a time."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("SSD, reads at a time", overflow="fold")
    depths = sorted({depth for speed in ssds.values() for depth in speed.bytes_per_s})
    for header in (*map(str, depths), "block"):
        table.add_column(header, justify="right", no_wrap=True)
    for host, speed in ssds.items():
        rates = [f"{speed.bytes_per_s[depth] / GB:.2f} GB/s" for depth in depths]
        table.add_row(host, *rates, format_bytes(speed.block_bytes))
    return table


def link_table(diagnosis: Diagnosis) -> Table:
    """Return a table of the measured networks."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("network", overflow="fold")
    for header in ("round trip", "Gbit/s", "sum"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    one_token = _timing(diagnosis.self_test, "sum", 1)
    for link in diagnosis.links:
        is_chosen = link.network == diagnosis.network
        table.add_row(
            str(link.network),
            _milliseconds(link.speed.round_trip_s) if link.speed else "-",
            f"{link.speed.bytes_per_s * 8e-9:.2f}" if link.speed else "-",
            _milliseconds(one_token.median_s) if is_chosen and one_token else "-",
            "chosen" if is_chosen else "no answer" if link.speed is None else "",
        )
    return table


def timing_line(test: SelfTest) -> str:
    """Return the durations of the self-test's all-reduces as one line."""
    one, many = _timing(test, "sum", 1), max(test.timings, key=lambda timing: timing.payload.size_bytes)
    assert one is not None
    return (
        f"Sum of one token (bfloat16): {_milliseconds(one.median_s)}, 99 of 100 below {_milliseconds(one.p99_s)}; "
        f"of {many.payload.tokens} tokens ({many.payload.dtype}): {_milliseconds(many.median_s)}, "
        f"{format_bytes(many.bytes_per_s)}/s."
    )


def timing_table(test: SelfTest) -> Table:
    """Return a table of all sizes of the self-test."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("self-test")
    for header in ("bytes", "median", "99 %", "rate"):
        table.add_column(header, justify="right", no_wrap=True)
    for timing in sorted(test.timings, key=lambda t: (t.payload.kind, t.payload.dtype, t.payload.tokens)):
        table.add_row(
            timing.payload.name,
            str(timing.payload.size_bytes),
            _milliseconds(timing.median_s),
            _milliseconds(timing.p99_s),
            f"{format_bytes(timing.bytes_per_s)}/s",
        )
    return table


def all_reduce_table(choice: AllReduceChoice) -> Table:
    """Return a table of the durations of both all-reduce methods, by size."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("sum of tokens")
    for header in ("bytes", "gathered", "all_sum"):
        table.add_column(header, justify="right", no_wrap=True)
    for timing in choice.timings:
        times = (_milliseconds(timing.gather_s), _milliseconds(timing.all_sum_s))
        table.add_row(str(timing.tokens), str(timing.size_bytes), *times)
    return table


def _timing(test: SelfTest | None, kind: str, tokens: int) -> Timing | None:
    matching = (
        timing
        for timing in (test.timings if test else ())
        if (timing.payload.kind, timing.payload.tokens, timing.payload.dtype) == (kind, tokens, "bfloat16")
    )
    return next(matching, None)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def next_step(diagnosis: Diagnosis, need: ModelNeed, option: str, *, is_launch: bool = False) -> tuple[str, str]:
    """Return the advice at the end of the report and its command, which is empty if there is none."""
    problems, warnings = (sum(f.state == state for f in diagnosis.findings) for state in ("problem", "warning"))
    if problems:
        advice = "1 problem found. Fix it" if problems == 1 else f"{problems} problems found. Fix them"
        return f"{advice} and run {'the launch' if is_launch else 'doctor'} again.", ""
    model = "" if need.name == Settings().model else f" {need.name}"
    command = f"kimi-mlx chat{model}"
    if option:
        command = f"kimi-mlx launch {option}" + (f" chat{model}" if model else "")
    suffix = "" if not warnings else " (1 warning)" if warnings == 1 else f" ({warnings} warnings)"
    return f"All checks passed{suffix}. Next:", command
