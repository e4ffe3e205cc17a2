#!/usr/bin/env python3
"""Write docs/cli.md from the help of all commands; a test compares.

scripts/make_cli_docs.py            write docs/cli.md
"""

from __future__ import annotations

from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from kimi_mlx.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
ENVIRONMENT = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}


def command_names() -> list[str]:
    """Return the names of the visible commands, in the order of the help."""
    group = get_command(app)
    context = group.make_context("kimi-mlx", [], resilient_parsing=True)
    commands = {name: group.get_command(context, name) for name in group.list_commands(context)}  # pyright: ignore
    return [name for name, command in commands.items() if command is not None and not command.hidden]


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
    for name in command_names():
        sections += [f"## kimi-mlx {name}", f"```text\n{help_text(name)}\n```"]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
