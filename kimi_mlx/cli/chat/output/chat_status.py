"""The status line of a chat: model, ranks, context, speed, and what is happening."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kimi_mlx.cli.chat.output.terminal_text import cell_width, shorten, to_line
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.units import format_count, format_duration, format_rate

if TYPE_CHECKING:
    from kimi_mlx.session.chat_model import ChatModel

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
SPINNER_AFTER_S = 2.0
"""Duration after which an activity has a spinner, with its time."""
BAR_WIDTH = 20
HOW_TO_STOP = "Ctrl-C stops"


@dataclass
class Activity:
    """Something that takes time.

    Args:
        text: what is happening, such as `reading`.
        done: amount that is done.
        total: amount in all; None if it is not known.
        unit: unit of both, in the plural; empty to show their ratio only.
        since: time when it began.
        first: amount that was done then, such as the tokens of a prompt that are in a cache.
    """

    text: str
    done: int = 0
    total: int | None = None
    unit: str = ""
    since: float = field(default_factory=lambda: time.monotonic())
    first: int = 0

    @property
    def seconds(self) -> float:
        """Time since it began."""
        return time.monotonic() - self.since

    def forms(self) -> Iterator[str]:
        """Yield its description, the longest first."""
        seconds = self.seconds
        is_long = seconds >= SPINNER_AFTER_S
        if not self.total:
            if is_long:
                yield f"{self.text}, {format_duration(seconds)}"
            yield self.text
            return
        fraction = min(1.0, self.done / self.total)
        share = f"{self.text} {fraction:.0%}"
        amount = f"{self.text} {self.done:,} of {self.total:,} {self.unit}" if self.unit else share
        left = ""
        if is_long and self.done > self.first:
            rate = (self.done - self.first) / seconds
            left = f"{format_duration((self.total - self.done) / rate)} left"
        elif is_long:
            left = format_duration(seconds)
        if is_long:
            filled = round(fraction * BAR_WIDTH)
            yield f"{amount} {'━' * filled}{'─' * (BAR_WIDTH - filled)} {left}"
        yield _join([amount, left])
        yield _join([share, left])
        yield share


@dataclass
class ChatStatus:
    """What a chat shows about itself, for its answers and for the line of input.

    Args:
        model: name of the model for people.
        num_ranks: number of ranks that compute; 0 if it is not known.
        context: size of the context in tokens; 0 if it is not known.
        used: number of tokens of the context in use.
        tok_per_s: speed of the last answer, or of the current one.
        activity: what is happening; None if nothing is.
    """

    model: str = ""
    num_ranks: int = 0
    context: int = 0
    used: int = 0
    tok_per_s: float = 0.0
    activity: Activity | None = None

    def set(self, text: str, done: int = 0, total: int | None = None, unit: str = "tokens") -> None:
        """Set the activity. The same text with another amount continues the same activity.

        Args:
            text: what is happening, such as `reading` or `waiting for mac-b`.
            done: amount that is done.
            total: amount in all; None if it is not known.
            unit: unit of both, in the plural; empty to show their ratio only.
        """
        text = to_line(text)
        if self.activity is None or self.activity.text != text:
            self.activity = Activity(text, first=done)
        self.activity.done, self.activity.total, self.activity.unit = done, total, unit

    def clear(self) -> None:
        """Remove the activity."""
        self.activity = None

    def line(self, width: int) -> str:
        """Return the status as one line of text, shortened to a width in cells."""
        for form in self._forms():
            line = " · ".join(part for part in form if part)
            if cell_width(line) <= width:
                return line
        return shorten([*self._forms()][-1][0] or to_line(self.model), width)

    def _forms(self) -> Iterator[list[str]]:
        """Yield the parts of the line, with ever fewer and shorter ones."""
        activity = self.activity
        forms = list(activity.forms()) if activity else [""]
        if activity and activity.seconds >= SPINNER_AFTER_S:
            spinner = SPINNER[int(activity.seconds * 10) % len(SPINNER)]
            forms = [f"{spinner} {form}" for form in forms]
        model = to_line(self.model)
        ranks = format_count(self.num_ranks, "rank") if self.num_ranks > 1 else ""
        speed = format_rate(self.tok_per_s) if self.tok_per_s else ""
        context = share = ""
        if self.context:
            context = f"{self.used:,} of {self.context:,} tokens"
            share = f"{self.used / self.context:.0%} of {_in_thousands(self.context)}"
        elif self.used:
            context = share = f"{self.used:,} tokens"
        *longer, shortest = forms
        if activity:
            yield [forms[0], model, ranks, context, speed, HOW_TO_STOP]
        for form in longer or forms:
            yield [form, model, ranks, context, speed]
            yield [form, model, ranks, share, speed]
        form = (longer or forms)[-1]
        yield [form, ranks, share, speed]
        yield [form, share, speed]
        yield [form, speed]
        yield [form]
        yield [shortest]


def status_of(model: ChatModel) -> ChatStatus:
    """Return the status of a new chat; num_ranks is 0 if the model cannot report it."""
    try:
        num_ranks = len(model.status().ranks)
    except KimiMlxError:
        num_ranks = 0
    return ChatStatus(model.name, num_ranks, model.context)


def _in_thousands(tokens: int) -> str:
    return f"{tokens / 1024:.0f}k" if tokens >= 1024 else str(tokens)


def _join(parts: list[str]) -> str:
    return ", ".join(part for part in parts if part)
