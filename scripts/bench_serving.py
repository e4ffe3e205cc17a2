#!/usr/bin/env python3
"""Benchmark of a server with many clients: times, rates, errors and memory; optionally compared with mlx-lm's server.

python scripts/bench_serving.py --against mlx-lm                      kimi-mini, 8 clients: see docs/benchmark.md
python scripts/bench_serving.py --prompt-tokens 16-112 --answer-tokens 16-112 --against mlx-lm
python scripts/bench_serving.py --synthetic wide --against mlx-lm     a checkpoint of K2's shape
python scripts/bench_serving.py --turns 2 --prompt-tokens 256 --later-tokens 32 --answer-tokens 32 --against mlx-lm
python scripts/bench_serving.py --conversations 10000 --prompt-tokens 16 --answer-tokens 6 --repeat 1 --warmup 0
python scripts/bench_serving.py --workload agents --against mlx-lm    a hundred agents with a common prefix
python scripts/bench_serving.py --aborts 100 --slow-readers 2         with badly behaved clients
python scripts/bench_serving.py --url http://127.0.0.1:8080           a running server
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EXAMPLES = "Examples:\n\n" + "\n\n".join((__doc__ or "").splitlines()[2:])

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# so that servers started by the benchmark find the package
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

from kimi_mlx.bench.machine import OURS, commit, machine, now, versions  # noqa: E402
from kimi_mlx.bench.workloads import TEXT_SHAPES  # noqa: E402
from kimi_mlx.cli.output import print_error, print_json, stderr, stdout  # noqa: E402
from kimi_mlx.errors import KimiMlxError, UsageError  # noqa: E402
from scripts.serving.bad_clients import BadClientOptions  # noqa: E402
from scripts.serving.files import serving_checkpoint  # noqa: E402
from scripts.serving.load import Progress as OnRequestEnd  # noqa: E402
from scripts.serving.load import measure_serving  # noqa: E402
from scripts.serving.prompts import WORKLOADS, TokenRange, Workload  # noqa: E402
from scripts.serving.report import ServingReport  # noqa: E402
from scripts.serving.servers import MLX_LM, ServerUnderTest, mlx_lm_command, our_command, serving  # noqa: E402


def main(
    synthetic: Annotated[
        str | None,
        typer.Option(
            "--synthetic", metavar="wide|deep", help="Use a synthetic checkpoint of K2's shape instead of kimi-mini."
        ),
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="Measure a running server.")] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", help="API key of the server at --url.")] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="mlx-lm", help="Measure mlx-lm's server too, in alternation.")
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload",
            metavar="agents",
            help="Use a named workload instead of the options from --clients to --shared-tokens.",
        ),
    ] = None,
    clients: Annotated[
        int, typer.Option("--clients", help="Concurrent clients; each sends its next request when it has its answer.")
    ] = 8,
    conversations: Annotated[int, typer.Option("--conversations", help="Conversations per repetition.")] = 32,
    turns: Annotated[
        int, typer.Option("--turns", help="Requests per conversation; each repeats the conversation so far.")
    ] = 1,
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", help="Length of the first message; `16-112` for a random length.")
    ] = "64",
    later_tokens: Annotated[
        str | None, typer.Option("--later-tokens", help="Length of later messages.", show_default="--prompt-tokens")
    ] = None,
    answer_tokens: Annotated[str, typer.Option("--answer-tokens", help="Length of each answer, or a range.")] = "64",
    shared_tokens: Annotated[
        int, typer.Option("--shared-tokens", help="Length of a system prompt that all share.")
    ] = 0,
    stream: Annotated[bool, typer.Option(help="Stream the answers.")] = True,
    aborts: Annotated[int, typer.Option("--aborts", help="Additional streams that are aborted.")] = 0,
    slow_readers: Annotated[int, typer.Option("--slow-readers", help="Additional streams that are read slowly.")] = 0,
    warmup: Annotated[int, typer.Option("--warmup", min=0, max=1, help="Uncounted repetitions.")] = 1,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Counted repetitions.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of the messages.")] = 0,
    serve_options: Annotated[
        str, typer.Option("--serve-options", help="Options for `kimi-mlx serve`, as one argument.")
    ] = "",
    mlx_lm_options: Annotated[
        str, typer.Option("--mlx-lm-options", help="Options for `mlx_lm server`, as one argument.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON with all times.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Measure a server with many clients. The server is started and stopped by this script."""
    prompt, answer = TokenRange.parse(prompt_tokens), TokenRange.parse(answer_tokens)
    later = None if later_tokens is None else TokenRange.parse(later_tokens)
    load = Workload(clients, conversations, turns, prompt, later, answer, shared_tokens, stream, seed)
    if workload is not None:
        if workload not in WORKLOADS:
            raise UsageError(f"unknown workload `{workload}`", hint=f"use one of {', '.join(WORKLOADS)}")
        load = replace(WORKLOADS[workload], stream=stream, seed=seed)
        prompt = load.prompt_tokens
    misbehaviour = BadClientOptions(aborts, slow_readers, prompt.high) if aborts or slow_readers else None
    if against not in (None, MLX_LM):
        raise UsageError(f"cannot compare with `{against}`", hint=f"use --against {MLX_LM}")
    if synthetic not in (None, *TEXT_SHAPES):
        raise UsageError(f"unknown synthetic checkpoint `{synthetic}`", hint=f"use one of {', '.join(TEXT_SHAPES)}")
    model = url or synthetic or "kimi-mini"
    settings = {"model": model, "machine": machine(), "versions": versions(), "commit": commit(), "date": now()}
    with ExitStack() as stack:
        sides: list[ServerUnderTest] = []
        if url is not None:
            sides.append(ServerUnderTest(OURS if against is None else url, url.rstrip("/"), api_key=api_key))
        else:
            folder = serving_checkpoint(model)
            ours = our_command(folder, shlex.split(serve_options))
            sides.append(stack.enter_context(serving(OURS, ours)))
            if against is not None:
                theirs = mlx_lm_command(folder, shlex.split(mlx_lm_options))
                sides.append(stack.enter_context(serving(MLX_LM, theirs)))
        total = len(sides) * load.requests * (warmup + repeat)
        with _bar(total, is_quiet=json) as progress:
            runs = measure_serving(sides, load, warmup, repeat, misbehaviour, progress)
        healths = {side.side: side.health_when_idle() for side in sides}
    _show(ServingReport(load, settings, runs, healths), is_json=json, is_markdown=markdown)
    if any(record.error for run in runs for record in run.records if run.side == OURS):
        raise typer.Exit(1)


def _show(report: ServingReport, *, is_json: bool, is_markdown: bool) -> None:
    if is_json:
        print_json(report.to_dict())
    elif is_markdown:
        stdout.print(report.markdown(), markup=False, soft_wrap=True)
    else:
        for line in report.heading():
            stdout.print(line, style="dim", markup=False)
        stdout.print(report.table())
        for line in report.summary():
            stdout.print(line, markup=False)


@contextmanager
def _bar(total: int, *, is_quiet: bool) -> Generator[OnRequestEnd]:
    """Show a progress bar of requests on stderr, if it is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    is_hidden = is_quiet or not stderr.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True, disable=is_hidden) as progress:
        task = progress.add_task("starting", total=total)
        yield lambda side, record: progress.update(task, description=side, advance=1)


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # stop servers cleanly, as Ctrl-C does
        signal.signal(number, _end)
    try:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(epilog=EXAMPLES)(main)
        app()
    except KimiMlxError as error:
        print_error(error)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
