"""Show one answer while it is generated: reasoning, text, tool calls, progress and notes."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Literal, Protocol, TypeAlias

from rich.console import Console, RenderableType
from rich.text import Text

from kimi_mlx.cli.chat.output.chat_status import ChatStatus
from kimi_mlx.cli.chat.output.live_region import is_terminal
from kimi_mlx.cli.chat.output.plain_output import PlainOutput
from kimi_mlx.cli.chat.output.suspension import call_before_suspension
from kimi_mlx.cli.chat.output.terminal_output import TerminalOutput
from kimi_mlx.cli.chat.output.terminal_text import to_line
from kimi_mlx.cli.output import stderr, stdout
from kimi_mlx.engine.events import Encoded, Finished, Interrupted, Prefilled, Resumed
from kimi_mlx.session.chat_model import ChatEvent
from kimi_mlx.text.messages import Delta, ToolCall, UnparsedToolCall
from kimi_mlx.units import format_count, format_duration

ReasoningMode: TypeAlias = Literal["show", "hide", "fold"]
"""What is shown of the reasoning: all of it, nothing, or its end while it lasts and then one line."""

REFRESH_S = 0.05
"""Interval at which an answer is drawn."""
STATUS_AFTER_S = 0.3
"""Age of an answer from which it has a status line: a quicker one shows none."""


def is_plain(console: Console, option: bool = False) -> bool:
    """Return whether answers are plain text on a console.

    Args:
        console: console of the answers.
        option: whether to show plain text.
    """
    return option or console.no_color or not is_terminal(console)


class AnswerOutput(Protocol):
    """Where an answer is shown. Its methods are called one at a time."""

    def reasoning(self, text: str) -> None:
        """Continue the reasoning."""
        ...

    def end_reasoning(self) -> None:
        """End the reasoning."""
        ...

    def text(self, text: str) -> None:
        """Continue the text."""
        ...

    def end_text(self) -> None:
        """End the text, or one of several parts of it."""
        ...

    def tool_call(self, call: ToolCall | UnparsedToolCall) -> None:
        """Show a call."""
        ...

    def tool_result(self, call: ToolCall, text: str, is_error: bool) -> None:
        """Show the beginning of a result."""
        ...

    def note(self, renderable: RenderableType) -> None:
        """Show something of the program itself."""
        ...

    def refresh(self, has_status: bool = True) -> None:
        """Draw what has changed, with a status line or without."""
        ...

    def pause(self) -> None:
        """Leave the terminal to others until the next output."""
        ...

    def erase(self) -> None:
        """Erase what is drawn again by the next refresh; safe at any moment."""
        ...

    def close(self) -> None:
        """Draw what is left, and remove what does not stay."""
        ...


class AnswerView:
    """Shows one answer, or the rounds of an answer with tool calls; a context manager.

    On a terminal, Markdown is rendered and a status line stands below the answer. Otherwise the text is written as it
    is, and everything else goes to the other console. Nothing the model writes can control the terminal. All methods
    may be called from any thread.

    Args:
        status: status of the chat; kept up to date by the events of the answer.
        reasoning: what is shown of the reasoning.
        plain: whether to show plain text.
        console: console of the answer.
        notes: console of everything else, if the answer is plain.

    Attributes:
        status: status of the chat. `status.set(...)` sets the activity.
    """

    def __init__(
        self,
        status: ChatStatus | None = None,
        reasoning: ReasoningMode = "fold",
        plain: bool = False,
        console: Console = stdout,
        notes: Console = stderr,
    ):
        self.status = status or ChatStatus()
        is_rendered = not is_plain(console, plain)
        # reasoning in a log file would be noise
        self._mode: ReasoningMode = reasoning if is_rendered or notes.is_terminal else "hide"
        self._output: AnswerOutput
        if is_rendered:
            self._output = TerminalOutput(console, self.status, folds=reasoning == "fold")
        else:
            self._output = PlainOutput(console, notes, self.status, folds=reasoning == "fold")
        self._lock = threading.RLock()
        self._part: Literal["reasoning", "text"] | None = None
        self._has_shown = False
        self._num_reasoning_tokens = 0
        self._reasoning_since = 0.0
        self._num_tokens = 0
        self._first_token_at = 0.0
        self._opened_at = time.monotonic()
        self._is_paused = False
        self._suspension = ExitStack()
        self._is_over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._refresh_often, daemon=True)

    @property
    def has_shown(self) -> bool:
        """Whether anything other than reasoning was shown."""
        return self._has_shown

    def show(self, event: ChatEvent) -> None:
        """Show the next event of the answer."""
        with self._lock:
            self._raise_error()
            if isinstance(event, Delta):
                self._show_delta(event)
            elif isinstance(event, Encoded):
                number = f" {event.image} of {event.num_images}" if event.num_images > 1 else ""
                self.status.set(f"image{number}: encoding", event.done, event.total, unit="")
            elif isinstance(event, Prefilled):
                self.status.used = event.total
                self.status.set("reading", event.done, event.total)
            elif isinstance(event, Interrupted):
                self._interrupted(event)
            elif isinstance(event, Resumed):
                self.status.clear()
                self.note(f"the answer continues after {format_duration(event.seconds)}")
            else:
                self._finished(event)

    def print(self, renderable: RenderableType) -> None:
        """Show something of the program itself: a note, a table, an image; above what is still being written."""
        with self._lock:
            self._output.note(renderable)

    def note(self, text: str) -> None:
        """Show a message of the program itself, dimmed."""
        self.print(Text("\n".join(to_line(line) for line in text.splitlines()), style="dim"))

    def tool_started(self, call: ToolCall) -> None:
        """Show in the status line that a call runs."""
        self.status.set(f"running {call.name}")

    def tool_finished(self, call: ToolCall, result: str, is_error: bool = False) -> None:
        """Show the beginning of the result of a call.

        Args:
            call: call that has ended.
            result: text of the result or of the error.
            is_error: whether the call failed.
        """
        with self._lock:
            self.status.clear()
            self._output.tool_result(call, result, is_error)

    @contextmanager
    def paused(self) -> Generator[None]:
        """Leave the terminal to others, for example to ask a question, until the end of the block."""
        with self._lock:
            self._output.pause()
            self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def refresh(self) -> None:
        """Draw what has changed; a thread of the view calls this often."""
        with self._lock:
            if not (self._is_paused or self._is_over.is_set()):
                self._output.refresh(time.monotonic() - self._opened_at >= STATUS_AFTER_S)

    def finish(self) -> None:
        """Show what is left and remove the status line; further calls do nothing."""
        if self._is_over.is_set():
            return
        self._is_over.set()
        self._suspension.close()
        with self._lock:
            self._end_part()
            self.status.clear()
            self._output.close()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> AnswerView:
        """Show the status line from now on, and return the view."""
        self._suspension.enter_context(call_before_suspension(self._release))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Call finish()."""
        self.finish()

    def _release(self) -> None:
        with self._lock:
            self._output.erase()

    def _show_delta(self, delta: Delta) -> None:
        self._count_token()
        if delta.reasoning:
            self._begin("reasoning", "thinking")
            self._num_reasoning_tokens += 1
            if self._mode != "hide":
                self._output.reasoning(delta.reasoning)
        if delta.text:
            self._begin("text", "answering")
            self._has_shown = True
            self._output.text(delta.text)
        for call_delta in delta.tool_call_deltas:
            if call_delta.name:
                self._end_part()
                self.status.set(f"calling {call_delta.name}")
        for call in delta.tool_calls:
            self._end_part()
            self._has_shown = True
            self._output.tool_call(call)

    def _begin(self, part: Literal["reasoning", "text"], activity: str) -> None:
        """Begin a part of the answer, if it is not the current one."""
        if self._part == part:
            return
        self._end_part()
        self._part = part
        self.status.set(activity)
        if part == "reasoning":
            self._num_reasoning_tokens, self._reasoning_since = 0, time.monotonic()

    def _end_part(self) -> None:
        part, self._part = self._part, None
        if part == "text":
            self._output.end_text()
        elif part == "reasoning":
            self._output.end_reasoning()
            if self._mode == "fold":
                elapsed = time.monotonic() - self._reasoning_since
                duration = format_duration(elapsed) if elapsed >= 1 else "less than 1 s"
                self.note(f"thought for {duration}, {format_count(self._num_reasoning_tokens, 'token')}")

    def _count_token(self) -> None:
        """Count a delta as one token of the context, and measure the speed."""
        now = time.monotonic()
        self._first_token_at = self._first_token_at or now
        self._num_tokens += 1
        self.status.used += 1
        if now - self._first_token_at > 1.0:
            self.status.tok_per_s = (self._num_tokens - 1) / (now - self._first_token_at)

    def _interrupted(self, event: Interrupted) -> None:
        attempt = f"attempt {event.attempt} of {event.attempts}"
        self.note(f"{event.reason}\nreconnecting in {event.wait_s:.0f} s, {attempt}")
        self.status.set(f"reconnecting, {attempt}")

    def _finished(self, event: Finished) -> None:
        self._end_part()
        self.status.clear()
        self.status.used = event.statistics.prompt_tokens + event.statistics.generated_tokens
        self.status.tok_per_s = event.statistics.decode_tok_per_s
        self._num_tokens, self._first_token_at = 0, 0.0

    def _refresh_often(self) -> None:
        """Redraw until the answer ends; an error is raised by the next show()."""
        try:
            while not self._is_over.wait(REFRESH_S):
                self.refresh()
        except BaseException as error:  # the terminal is closed: SystemExit belongs into the main thread
            self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
