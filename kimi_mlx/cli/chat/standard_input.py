"""Standard input of a chat: a pipe or file with a prompt, a terminal to ask on, or neither."""

from __future__ import annotations

import os
import stat
import sys

from kimi_mlx.errors import UsageError

ADD_PROMPT = 'add a prompt: `-p "Hello"`'


def require_prompt(prompt: str | None) -> None:
    """Check that there is a prompt, a pipe or a terminal, without reading from it.

    Raises:
        UsageError: there is none.
    """
    if prompt is None and not is_piped() and not _is_terminal():
        raise UsageError("no prompt given and no terminal to ask on", hint=ADD_PROMPT)


def is_piped() -> bool:
    """Return whether standard input is a pipe, a socket or a file."""
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        return False
    mode = os.fstat(sys.stdin.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()  # pyright: ignore[reportUnnecessaryComparison]
