"""The user's text editor, for a message."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from prompt_toolkit.input.vt100 import cooked_mode

from kimi_mlx.cli.chat.input.terminal_modes import READING
from kimi_mlx.cli.chat.signal_handlers import signal_handlers
from kimi_mlx.cli.output import escape_controls
from kimi_mlx.errors import UsageError

FALLBACKS = ("nano", "vi")
"""Editors without VISUAL and EDITOR; nano first, since it shows its keys."""


def edit_text(text: str) -> str:
    """Let the user edit a text; return it without line ends at its end.

    Raises:
        UsageError: there is no editor, it failed, or the file cannot be written or read.
    """
    command = _editor()
    try:
        with tempfile.TemporaryDirectory(prefix="kimi-mlx-") as folder:  # readable by the user only
            path = Path(folder) / "message.md"
            end = "\n" if text and not text.endswith("\n") else ""
            path.write_text(text + end, encoding="utf-8", errors="replace", newline="")
            _run([*command, str(path)])
            return path.read_bytes().decode("utf-8", errors="replace").rstrip("\r\n")
    except OSError as error:
        raise UsageError(
            f"`{command[0]}` left no message: {error.strerror}", hint="save the file under the name that it has"
        ) from error


def _editor() -> list[str]:
    """Return the command line of the editor.

    Raises:
        UsageError: there is none, or the variable that names it cannot be read.
    """
    for variable in ("VISUAL", "EDITOR"):
        if value := os.environ.get(variable, "").strip():
            try:
                command = shlex.split(value)
            except ValueError as error:
                raise UsageError(f"{variable} is `{value}`: {error}", hint=f"export {variable}=nano") from error
            if shutil.which(os.path.expanduser(command[0])) is None:
                raise UsageError(
                    f"there is no editor `{command[0]}`, which {variable} names", hint=f"export {variable}=nano"
                )
            return [os.path.expanduser(command[0]), *command[1:]]
    for name in FALLBACKS:
        if shutil.which(name) is not None:
            return [name]
    raise UsageError("there is no editor", hint="export EDITOR=NAME, then start the chat again")


def _run(command: list[str]) -> None:
    r"""Run an editor on the terminal. Ctrl-C and Ctrl-\ are its keys until it ends.

    Raises:
        UsageError: it failed.
    """
    terminal = None if sys.stdout.isatty() else sys.stderr
    ignored = {signal.SIGINT: _ignore, signal.SIGQUIT: _ignore}
    with signal_handlers(ignored), READING, cooked_mode(sys.stdin.fileno()):
        code = subprocess.run(command, stdout=terminal, check=False).returncode
    if code:
        name = escape_controls(shlex.join(command[:-1]))
        reason = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        raise UsageError(f"`{name}` {reason}", hint="the message is as it was; VISUAL or EDITOR names another editor")


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing, in this process only: a program that it starts does not inherit a handler."""
