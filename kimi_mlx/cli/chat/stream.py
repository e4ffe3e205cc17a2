"""Print an answer as it streams in, without control sequences that a terminal would execute."""

from __future__ import annotations

import json
import re
import threading
from textwrap import indent
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment, Segments
from rich.style import Style

from kimi_mlx.cli.output import PROGRESS_AFTER_S, print_note, stderr
from kimi_mlx.engine.events import Encoded, Finished, Interrupted, Prefilled, Resumed
from kimi_mlx.session.chat_model import ChatEvent
from kimi_mlx.text.messages import ToolCall, UnparsedToolCall

# CSI sequences (colours, cursor), other escape sequences, then any control character but newline and tab.
# Lengths are limited, so that an unfinished sequence never holds back much text.
_CONTROL = re.compile(r"(?:\x1b\[|\x9b)[0-?]{0,32}[ -/]{0,4}[@-~]|\x1b[ -/]{0,4}[0-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_UNFINISHED = re.compile(r"(?:\x1b(?:\[[0-?]{0,32})?|\x9b[0-?]{0,32})[ -/]{0,4}\Z")

PLAIN, DIM, DIM_ITALIC = Style(), Style(dim=True), Style(dim=True, italic=True)


class ControlFilter:
    """Removes control sequences from a stream of text; the result does not depend on where the text is cut."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> str:
        """Return the text that can be shown; the start of an escape sequence is held back until its end arrives."""
        text = self._held + text
        unfinished = _UNFINISHED.search(text)
        self._held = unfinished.group() if unfinished else ""
        return _CONTROL.sub("", text[: len(text) - len(self._held)])


NARROW = 64
"""Number of columns below which the progress of a prompt is text only."""


class PromptProgress:
    """Progress bar of a prompt: images, then tokens; shown only on a terminal, and only if the prompt takes long.

    A timer shows the bar, because the first progress event may take long itself. On a narrow console it has no bar.

    Args:
        console: console that shows the bar.
        after_s: time after which the bar appears.
    """

    def __init__(self, console: Console, after_s: float = PROGRESS_AFTER_S):
        is_narrow = console.width < NARROW
        self._progress = Progress(
            TextColumn("{task.description}"),
            *([] if is_narrow else [BarColumn()]),
            TextColumn("{task.fields[amount]}"),
            *([] if is_narrow else [TimeElapsedColumn()]),
            console=console,
            transient=True,
            disable=not console.is_terminal or console.is_dumb_terminal,
        )
        self._task = self._progress.add_task("processing the prompt", total=None, amount="")
        self._lock = threading.Lock()
        self._is_over = False
        self._timer = threading.Timer(after_s, self._appear)
        self._timer.daemon = True

    def start(self) -> None:
        """Start the timer."""
        if not self._progress.disable and not self._is_over:
            self._timer.start()

    def update(self, event: Encoded | Prefilled) -> None:
        """Update the progress; the end of prefill removes the bar."""
        done, total = event.done, event.total
        if isinstance(event, Encoded):
            number = f" {event.image} of {event.num_images}" if event.num_images > 1 else ""
            description, amount = f"encoding image{number}", f"{done / total:.0%}"
        else:
            description, amount = "processing the prompt", f"{done}/{total} tokens"
        self._progress.update(self._task, completed=done, total=total, description=description, amount=amount)
        if isinstance(event, Prefilled) and done >= total:
            self.stop()

    def stop(self) -> None:
        """Remove the bar permanently; further calls do nothing."""
        self._timer.cancel()
        with self._lock:
            if not self._is_over:
                self._is_over = True
                self._progress.stop()

    def _appear(self) -> None:
        with self._lock:
            if not self._is_over:
                self._progress.start()


class AnswerPrinter:
    """Prints one answer; as a context manager it always ends the line and removes the progress bar.

    Reasoning, text and each tool call are parts, separated by an empty line. Text of the model is never interpreted
    as markup. Control characters and empty lines at both ends of a part are removed.

    Args:
        console: console of the answer.
        show_reasoning: whether to show the reasoning, dimmed.
        plain: whether to print only the answer to the console, and the reasoning to stderr.
    """

    def __init__(self, console: Console, show_reasoning: bool, plain: bool):
        self._console = console
        self._show_reasoning = show_reasoning
        self._reasoning_console = stderr if plain else console
        self._progress = PromptProgress(stderr)
        self._filter = ControlFilter()
        self._part: str | None = None  # current one
        self._last_console: Console | None = None  # of the last part
        self._has_answer = False
        self._newlines = ""  # at the end of the text so far: printed when the part continues

    @property
    def has_shown(self) -> bool:
        """Whether anything other than reasoning was printed."""
        return self._has_answer

    def show(self, item: ChatEvent) -> None:
        """Print the next event of the answer: text, progress, or an interruption."""
        if isinstance(item, Interrupted | Resumed):
            self._progress.stop()
            # on stderr: the answer continues in the middle of its line
            print_note(f"\n[{interruption_line(item)}]")
            return
        if isinstance(item, Encoded | Prefilled):
            self._progress.update(item)
            return
        self._progress.stop()
        if isinstance(item, Finished):
            return
        if item.reasoning and self._show_reasoning:
            self._write("reasoning", item.reasoning, self._reasoning_console, DIM)
        if item.text:
            self._write("text", item.text, self._console)
        for call in item.tool_calls:
            self._end_part()
            self._write("tool call", format_tool_call(call), self._console)
            self._end_part()

    def finish(self) -> None:
        """End the last line; further calls do nothing."""
        self._progress.stop()
        self._end_part()

    def __enter__(self) -> AnswerPrinter:
        """Start the progress bar, and return the printer."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Call finish()."""
        self.finish()

    def _write(self, part: str, text: str, console: Console, style: Style = PLAIN) -> None:
        """Continue a part, or begin it with its first line that is not empty."""
        text = self._filter.add(text)
        if part != self._part:
            text = text.lstrip("\n")
            if not text:
                return
            self._begin_part(part, console)
        text = self._newlines + text
        shown = text.rstrip("\n")
        self._newlines = text[len(shown) :]
        _print_exactly(console, shown, style)

    def _begin_part(self, part: str, console: Console) -> None:
        self._end_part()
        if self._last_console is not None:
            _print_exactly(self._last_console, "\n")
        self._part, self._last_console = part, console
        self._has_answer = self._has_answer or part != "reasoning"
        if part == "reasoning":  # as text too, for terminals that cannot dim
            _print_exactly(console, "thinking:\n", DIM_ITALIC)

    def _end_part(self) -> None:
        if self._part is not None and self._last_console is not None:
            _print_exactly(self._last_console, "\n")
        self._part, self._newlines = None, ""


def format_tool_call(call: ToolCall | UnparsedToolCall) -> str:
    """Format a tool call for people: the name, then the arguments, indented."""
    if isinstance(call, UnparsedToolCall):
        return f"broken tool call ({call.reason}):\n{indent(call.raw, '  ')}"
    try:
        arguments = json.dumps(json.loads(call.arguments), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        arguments = call.arguments
    return f"tool call {call.name}\n{indent(arguments, '  ')}"


def interruption_line(event: Interrupted | Resumed) -> str:
    """Describe what happened to the ring, in one or more lines."""
    if isinstance(event, Resumed):
        return f"the answer continues after {event.seconds:.0f} s"
    return f"{event.reason}\n reconnecting in {event.wait_s:.0f} s, attempt {event.attempt} of {event.attempts}"


def _print_exactly(console: Console, text: str, style: Style = PLAIN) -> None:
    """Print text without wrapping, markup and expansion of tabs by Rich."""
    console.print(Segments([Segment(text, style)]), end="", soft_wrap=True)
