"""Output of `kimi-mlx history`: the table of conversations, matches of a search, and a whole conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePath

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.chat.output.terminal_text import cell_width, remove_controls, shorten, to_line
from kimi_mlx.cli.output import stdout
from kimi_mlx.history.find import Match
from kimi_mlx.history.markdown import to_markdown
from kimi_mlx.history.records import ConversationRecord, MessageRecord
from kimi_mlx.text.messages import Delta
from kimi_mlx.units import format_count

NARROW = 60
"""Width of the terminal below which the table has no models."""
MAX_MODEL = 18
"""Width of the column of models."""
MIN_TITLE, GAP = 8, 2
"""Minimum width of the column of titles, and the space between columns."""


def print_conversations(conversations: Sequence[ConversationRecord], console: Console = stdout) -> None:
    """Print a table of conversations, one line each."""
    console.print(conversation_table(conversations, console.width), soft_wrap=False)


def conversation_table(conversations: Sequence[ConversationRecord], width: int) -> Table:
    """Return a table of conversations for a terminal of `width` columns."""
    rows = [
        [
            item.id,
            format_when(item.updated_s),
            *([] if width < NARROW else [shorten(to_line(PurePath(item.model).name), MAX_MODEL)]),
            str(item.num_turns),
        ]
        for item in conversations
    ]
    headers = ["id", "when", *([] if width < NARROW else ["model"]), "turns"]
    used = sum(max(map(cell_width, column)) + GAP for column in zip(headers, *rows, strict=True))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for header in (*headers[:-1], "title", headers[-1]):
        table.add_column(header, no_wrap=True, justify="right" if header == "turns" else "left")
    for item, row in zip(conversations, rows, strict=True):
        title = shorten(to_line(item.title), max(width - used, MIN_TITLE))
        table.add_row(*map(Text, (*row[:-1], title, row[-1])))
    return table


def format_when(seconds: float) -> str:
    """Return a time in the user's time zone: `today 15:04`, `Nov 28 15:04`, or `2025-11-28` in another year."""
    time, now = datetime.fromtimestamp(seconds), datetime.now()
    if time.date() == now.date():
        return time.strftime("today %H:%M")
    return time.strftime("%b %d %H:%M" if time.year == now.year else "%Y-%m-%d")


def print_matches(matches: Sequence[Match], words: Sequence[str], console: Console = stdout) -> None:
    """Print the conversations that a search has found, with the text around the first match."""
    pattern = re.compile("|".join(re.escape(" ".join(word.split())) for word in words), re.IGNORECASE)
    for match in matches:
        item = match.conversation
        count = f" · in {format_count(match.num_messages, 'message')}"
        head = Text.assemble(
            (item.id, "bold"), f"  {format_when(item.updated_s)}  ", to_line(item.title), (count, "dim")
        )
        head.highlight_regex(pattern, "reverse")
        console.print(head, soft_wrap=False)
        if match.snippet:
            line = Text(to_line(f"{match.role}: {match.snippet}"))
            line.highlight_regex(pattern, "reverse")
            line.pad_left(2)
            console.print(line, soft_wrap=False)


def print_conversation(conversation: ConversationRecord, messages: Sequence[MessageRecord]) -> None:
    """Print a conversation: rendered on a terminal, as Markdown elsewhere."""
    from kimi_mlx.cli.chat.output.answer_view import AnswerView, is_plain  # heavy: not for the table

    text = remove_controls(to_markdown(conversation, messages))
    if is_plain(stdout):
        print(text, end="")
    else:
        with AnswerView() as view:
            view.show(Delta(text))
