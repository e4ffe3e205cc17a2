#!/usr/bin/env python3
"""Benchmark of loading a model on several ranks: bytes read, time and peak memory; by default compared with mlx-lm.

python scripts/bench_loading.py                3 GB, 2 ranks, against mlx-lm: see docs/benchmark.md
python scripts/bench_loading.py --size-gb 0.02 --repeat 1 --json
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# so that processes started by the benchmark find the package
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

from kimi_mlx.cli.output import print_error, print_json, stderr, stdout  # noqa: E402
from kimi_mlx.errors import KimiMlxError, UsageError  # noqa: E402
from kimi_mlx.model.config import load_config  # noqa: E402
from kimi_mlx.runtime.load import compute_dtype  # noqa: E402
from scripts.loading.files import Progress as FilesProgress  # noqa: E402
from scripts.loading.files import make_files  # noqa: E402
from scripts.loading.measure import LoadingRun, loading_sides, measure_loading  # noqa: E402
from scripts.loading.report import (  # noqa: E402
    loading_heading,
    loading_lines,
    loading_rows,
    loading_settings,
    loading_table,
    loading_to_dict,
)


def main(
    size_gb: Annotated[float, typer.Option("--size-gb", help="Minimum size of the checkpoint.")] = 3.0,
    ranks: Annotated[int, typer.Option("--ranks", min=2, help="Number of ranks.")] = 2,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Number of loads of each side.")] = 3,
    against: Annotated[bool, typer.Option(help="Also load with mlx-lm, and print the ratios.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Load a synthetic checkpoint of K2's shape with kimi-mlx and mlx-lm in alternation. Its files are created once."""
    with _files_bar(json) as progress:
        files = make_files(size_gb, ranks, progress)
    config = load_config(files.copies[0])
    default_dtype = str(compute_dtype(None, config)).removeprefix("mlx.core.")
    settings = {**loading_settings(files, config.dtype), "commit": commit()}
    sides = loading_sides(files, config.dtype, default_dtype, against)
    with stderr.status("loading") if not json and stderr.is_terminal else nullcontext() as status:

        def show(run: LoadingRun) -> None:
            if status is not None:
                status.update(f"{run.side}: {max(load.seconds for load in run.loads):.2f} s")

        runs = measure_loading(sides, repeat, show)
    if json:
        print_json(loading_to_dict(runs, settings))
        return
    rows = loading_rows(runs)
    stdout.print(loading_heading(runs, settings), style="dim", markup=False)
    stdout.print(loading_table(rows))
    for line in loading_lines(rows):
        stdout.print(line, markup=False)


@contextmanager
def _files_bar(is_quiet: bool) -> Generator[FilesProgress]:
    """Show a progress bar on stderr while files are created, if it is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    is_hidden = is_quiet or not stderr.is_terminal
    with Progress(*columns, console=stderr, transient=True, disable=is_hidden) as progress:
        task = progress.add_task("checking files", total=None)
        yield lambda action, done, total: progress.update(task, description=action, completed=done, total=total)


def commit() -> str | None:
    """Return the commit of this checkout, with `+` if files have changed; None outside a repository."""
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # stop ranks cleanly, as Ctrl-C does
        signal.signal(number, _end)
    try:
        typer.run(main)
    except KimiMlxError as error:
        print_error(error)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
