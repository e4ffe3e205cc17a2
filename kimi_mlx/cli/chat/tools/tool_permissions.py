"""Permission for the calls of the model: by `--allow`, or by an answer in the terminal."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from rich.text import Text

from kimi_mlx.cli.chat.input.terminal_modes import READING, read_typed
from kimi_mlx.cli.chat.output.terminal_text import remove_controls, to_line
from kimi_mlx.cli.output import stderr
from kimi_mlx.text.messages import ToolCall
from kimi_mlx.tools.declarations import DeclaredTool, fingerprint

Answer = Literal["once", "tool", "all", "no"]
ALL = "all"
"""Word of `--allow` that allows all tools."""

ANSWERS: dict[str, Answer] = {
    **dict.fromkeys(("o", "once", "y", "yes"), "once"),
    **dict.fromkeys(("t", "tool"), "tool"),
    **dict.fromkeys(("a", "all"), "all"),
    **dict.fromkeys(("", "n", "no"), "no"),
}
"""What the user may type, in lower case. Enter alone is no."""

SHOW = ("s", "show")
"""Answers that show the arguments of the call in full; before, long ones are shortened."""

CHOICES = "(o)nce, this (t)ool, (a)ll, (N)o: "
ANSWER_CHARS = 4
"""Space for the answer beside the question."""

POLL_S = 0.1
"""Interval at which a question looks for Ctrl-C."""


class Pausable(Protocol):
    """Output that can leave the terminal to a question."""

    def paused(self) -> AbstractContextManager[None]:
        """Leave the terminal to others until the end of the block."""
        ...


Ask = Callable[[ToolCall, DeclaredTool, threading.Event], Answer]
"""Function that asks the user whether a call may run; the event is set when Ctrl-C is pressed."""


class Permissions:
    """Decides which calls may run, and remembers what the user has allowed.

    Args:
        allowed: names of tools, patterns such as `git_*`, or `all`.

    Attributes:
        ask: function that asks the user about other calls; None refuses them.
    """

    def __init__(self, allowed: Sequence[str] = ()):
        self._patterns = [pattern for pattern in allowed if pattern != ALL]
        self._allows_all = self._starts_with_all = ALL in allowed
        self.ask: Ask | None = None
        self._allowed_tools: set[str] = set()

    def is_allowed(self, tool: DeclaredTool) -> bool:
        """Return whether a tool may run without a question."""
        return (
            self._allows_all
            or any(fnmatchcase(tool.name, pattern) for pattern in self._patterns)
            or fingerprint(tool.tool) in self._allowed_tools
        )

    def allow(self, call: ToolCall, tool: DeclaredTool, view: Pausable, is_cancelled: threading.Event) -> bool:
        """Return whether a call may run; ask the user if nothing has decided it.

        A permission for a tool ends when its server changes the tool.

        Args:
            call: call of the model, which has been shown.
            tool: tool that it calls.
            view: what is shown, which leaves the terminal to the question.
            is_cancelled: set when Ctrl-C is pressed, which means no.
        """
        if self.is_allowed(tool):
            return True
        if self.ask is None or is_cancelled.is_set():
            return False
        with view.paused():
            answer = self.ask(call, tool, is_cancelled)
        if answer == "tool":
            self._allowed_tools.add(fingerprint(tool.tool))
        self._allows_all = self._allows_all or answer == "all"
        return answer != "no"

    def unknown_patterns(self, tools: Sequence[DeclaredTool]) -> list[str]:
        """Return the names and patterns of `--allow` that fit no tool."""
        return [pattern for pattern in self._patterns if not any(fnmatchcase(tool.name, pattern) for tool in tools)]

    def reset(self) -> None:
        """Forget what the user has answered; `--allow` stays."""
        self._allowed_tools.clear()
        self._allows_all = self._starts_with_all


class TerminalQuestion:
    """Asks in the terminal whether a call may run.

    An answer counts only if it is typed after the question, and ends with Enter. What was typed before is kept.

    Args:
        keep: function that receives text that was typed before the question, for the next message.
    """

    def __init__(self, keep: Callable[[str], None]):
        self._keep = keep

    def __call__(self, call: ToolCall, tool: DeclaredTool, is_cancelled: threading.Event) -> Answer:
        """Ask until the answer is valid."""
        with READING, _line_mode() as typed_before:
            if typed_before:
                self._keep(typed_before)
            while not is_cancelled.is_set():
                stderr.print(question_about(tool, stderr.width), end="", soft_wrap=True)
                line = _read_line(is_cancelled)
                if line is None:
                    break
                word = line.strip().lower()
                if (answer := ANSWERS.get(word)) is not None:
                    return answer
                if word in SHOW:
                    stderr.print(Text(remove_controls(call.arguments)), soft_wrap=True)
                else:
                    stderr.print(Text("Type o, t, a or n, then Enter; s shows all of the arguments.", style="dim"))
        stderr.print()
        return "no"


def question_about(tool: DeclaredTool, width: int) -> Text:
    """Return the question whether a tool may run; in two lines if one is wider than the terminal."""
    question = Text(f"Allow {to_line(tool.name)} of {to_line(tool.tool.server)}?", style="bold")
    question.append(" " if len(question) + len(CHOICES) + ANSWER_CHARS < width else "\n")
    return question.append(CHOICES, style="not bold")


@contextmanager
def _line_mode() -> Generator[str]:
    """Let the terminal edit and echo a line; yield what had been typed before."""
    modes = termios.tcgetattr(sys.stdin)
    cooked: list[Any] = [*modes[:6], [*modes[6]]]
    cooked[0] |= termios.ICRNL
    cooked[3] |= termios.ICANON | termios.ECHO | termios.ISIG
    try:
        typed = read_typed()
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, cooked)
        yield typed
    finally:
        with contextlib.suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)


def _read_line(is_cancelled: threading.Event) -> str | None:
    """Return a line from the terminal; None at Ctrl-C, Ctrl-D, or if it was closed."""
    while not is_cancelled.is_set():
        if select.select([sys.stdin], [], [], POLL_S)[0]:
            try:
                line = os.read(sys.stdin.fileno(), 4096)
            except OSError:
                return None
            return line.decode(errors="replace") if line else None
    return None
