#!/usr/bin/env python3
"""Time `kimi-mlx --help`, `--version` and a usage error of each command against `--help` of an empty Typer app."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from kimi_mlx.cli.command_list import command_names

REPETITIONS = 15
EMPTY = """
import typer
app = typer.Typer()
def make(number):
    def command(): "Do something."
    app.command(f"command{number}")(command)
for number in range(10): make(number)
app()
"""


def main() -> None:
    """Run the commands in turns; print median, spread and the ratio of medians."""
    python = sys.executable
    commands = {
        "empty Typer app --help": [python, "-c", EMPTY, "--help"],
        "kimi-mlx --help": [python, "-m", "kimi_mlx", "--help"],
        "kimi-mlx --version": [python, "-m", "kimi_mlx", "--version"],
        "kimi-mlx no-such-command": [python, "-m", "kimi_mlx", "no-such-command"],
        **{f"kimi-mlx {name} --nope": [python, "-m", "kimi_mlx", name, "--nope"] for name in command_names()},
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(REPETITIONS):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, check=False)
            times[name].append(time.perf_counter() - start)
    base = statistics.median(next(iter(times.values())))
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:26} {median:.3f} s ({min(values):.3f}-{max(values):.3f}), ratio {median / base:.2f}")


if __name__ == "__main__":
    main()
