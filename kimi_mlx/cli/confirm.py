"""Questions that are answered with yes or no."""

from __future__ import annotations

import sys

import typer

from kimi_mlx.cli.output import stderr
from kimi_mlx.errors import UsageError


def can_ask() -> bool:
    """Return whether there is a terminal to ask on."""
    return sys.stdin.isatty() and stderr.is_terminal


def confirm(question: str, unchanged: str, is_quiet: bool = False) -> None:
    """Ask before something is lost; return if the answer is yes.

    Args:
        question: question to answer with yes or no.
        unchanged: what is true if the answer is no, such as `nothing is removed`.
        is_quiet: whether not to ask, because the output is for a program.

    Raises:
        UsageError: there is no terminal.
        typer.Exit: the answer is no.
    """
    if is_quiet or not can_ask():
        raise UsageError(f"there is no terminal to ask on; {unchanged}", hint="add --yes to do it without asking")
    if not typer.confirm(question, default=False, err=True):
        stderr.print(unchanged, markup=False)
        raise typer.Exit(1)
