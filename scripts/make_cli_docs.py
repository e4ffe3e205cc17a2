#!/usr/bin/env python3
"""Write docs/cli.md from the help of all commands; a test compares.

scripts/make_cli_docs.py            write docs/cli.md
"""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from kimi_mlx.cli.app import app
from kimi_mlx.cli.command_list import COMMANDS

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
ENVIRONMENT = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}


def command_names() -> list[tuple[str, ...]]:
    """Return the visible commands, in the order of the help; those of a group follow it."""
    names: list[tuple[str, ...]] = []
    for info in COMMANDS:
        if not info.is_hidden:
            names += [(info.name,), *((info.name, command.name) for command in info.commands)]
    return names


def help_text(*arguments: str) -> str:
    """Return what `kimi-mlx ARGUMENTS --help` prints, 100 columns wide."""
    output = CliRunner().invoke(app, [*arguments, "--help"], prog_name="kimi-mlx", env=ENVIRONMENT).output
    return "\n".join(line.rstrip() for line in output.strip().splitlines())


def page() -> str:
    """Return the text of docs/cli.md."""
    sections = [
        "# Commands",
        "The output of `kimi-mlx --help` and `kimi-mlx COMMAND --help`. Written by `scripts/make_cli_docs.py`.",
        f"```text\n{help_text()}\n```",
    ]
    for names in command_names():
        sections += [f"{'#' * (len(names) + 1)} kimi-mlx {' '.join(names)}", f"```text\n{help_text(*names)}\n```"]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
