#!/usr/bin/env python3
"""Benchmark of experts on the SSD, against a memory map of the same file, plain LRU, and all experts in memory.

python scripts/bench_streaming.py               4 GB in a third of its memory: see docs/benchmark.md
python scripts/bench_streaming.py --bits 32     experts in float32, which the CPU computes faster than it reads them
python scripts/bench_streaming.py --size-gb 1 --tokens 16 --repeat 1 --json
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# so that processes started by the benchmark find the package
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

from kimi_mlx.bench import machine  # noqa: E402
from kimi_mlx.cli.bench_output import TABLE_WIDTH  # noqa: E402
from kimi_mlx.cli.output import print_error, print_json, stderr, stdout  # noqa: E402
from kimi_mlx.errors import KimiMlxError, UsageError  # noqa: E402
from scripts.streaming.files import EXPERT_SHAPES, EXPONENT, make_files, streaming_config  # noqa: E402
from scripts.streaming.measure import Memory, measure_streaming  # noqa: E402
from scripts.streaming.report import (  # noqa: E402
    Bound,
    heading,
    streaming_rows,
    streaming_table,
    streaming_to_dict,
    targets,
)


def main(
    size_gb: Annotated[float, typer.Option("--size-gb", help="Size of the experts.")] = 4.0,
    bits: Annotated[int, typer.Option("--bits", help="Bits of the experts' weights: 4 or 32.")] = 4,
    exponent: Annotated[float, typer.Option("--exponent", help="Exponent of the popularity of experts.")] = EXPONENT,
    share: Annotated[float, typer.Option("--memory-share", help="Memory as a share of the size.")] = 1 / 3,
    warmup: Annotated[int, typer.Option("--warmup", min=1, help="Tokens before the clock starts.")] = 32,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Timed tokens.")] = 96,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Number of runs of each side.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decode with a synthetic model that is larger than the memory. Its store is created once."""
    if bits not in EXPERT_SHAPES or size_gb <= 0 or not 0 < share < 1:
        raise UsageError("--bits must be 4 or 32, --size-gb above 0, and --memory-share between 0 and 1")
    with stderr.status("checking files") if not json and stderr.is_terminal else nullcontext() as status:

        def show(text: str) -> None:
            if status is not None:
                status.update(text)

        files = make_files(
            streaming_config(size_gb, bits),
            bits,
            exponent,
            lambda action, done, total: show(f"{action}: {done / total:.0%}"),
        )
        memory = Memory.of(files, share)
        runs = measure_streaming(files, memory, warmup=warmup, tokens=tokens, repeat=repeat, show=show)
    if json:
        settings = {
            "date": machine.now(),
            "machine": machine.machine(),
            "versions": machine.versions(),
            "commit": machine.commit(),
        }
        print_json(streaming_to_dict(files, memory, runs, settings))
        return
    rows = streaming_rows(runs)
    bound = Bound.of(runs, rows)
    for line in heading(files, memory, runs, bound):
        stdout.print(line, style="dim", markup=False)
    Console(width=TABLE_WIDTH, highlight=False, soft_wrap=True).print(streaming_table(rows))
    for target in targets(runs, rows, memory, bound):
        stdout.print(f"{'met' if target.is_met else 'MISSED'}: {target.name}: {target.figures}", markup=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except KimiMlxError as error:
        print_error(error)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
