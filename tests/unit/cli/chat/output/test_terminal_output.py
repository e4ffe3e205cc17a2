"""An answer on a real screen: the same whatever the pieces it arrives in, and nothing of the model controls it."""

from __future__ import annotations

import itertools
import re
import time
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cli.chat.output import terminal_output
from kimi_mlx.cli.chat.output.answer_view import AnswerView, ReasoningMode
from kimi_mlx.cli.chat.output.chat_status import ChatStatus
from kimi_mlx.cli.chat.output.live_region import BEGIN, END
from kimi_mlx.text.messages import Delta, ToolCall
from tests.examples import examples
from tests.screen import Screen

OWN_SEQUENCES = re.compile(r"\x1b\[(?:[0-9;]*m|\?(?:2026|7|25)[hl]|[0-9]+A|J|2K)")
LINES = ["# Title", "- item **bold**", "  - nested", "1. one", "> quote", "```python", "```", "x = 1  # code", "$$", ""]
LINES += ["| a | b |", "|---|---|", "| 1 | 漢字 |", "A paragraph that is longer than the narrowest of the screens."]
NASTY = ["\x1b[2J", "\x1b", "[2J", "\x9b1A", "\x07", "\x1b]8;;http://x\x1b\\", "&#27;[2J", "&#x9b;1A", "\u202e", "\r"]
NASTY += ["[link](http://x/\x1b[2J)", "```\x1b[2J", "<http://x/%1b>", "![\x1b[2J](\x9b)", "\u2028", "\x00", "\x85"]
NASTY += ["\U000e0041", "\u2066"]
TEXTS = st.lists(st.sampled_from(LINES), max_size=30).map("\n".join)
NASTY_TEXTS = st.lists(st.sampled_from([*LINES, *NASTY, "\n", " "]), max_size=30).map("".join)
AT_ONCE = patch.multiple(terminal_output, MIN_INTERVAL_S=0.0, MAX_LOAD=float("inf"))
"""A view that is refreshed here draws again at the next refresh."""
CUTS = st.lists(st.integers(0, 400), max_size=10)


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def shown(parts: list[str], columns: int, lines: int = 12) -> Screen:
    """Show a text that arrives in parts and is drawn after each."""
    screen = Screen(columns, lines)
    screen.write("> question\n")
    console = screen.console()
    view = AnswerView(ChatStatus("kimi", 2, 1000), console=console, notes=console)
    for part in parts:
        view.show(Delta(text=part))
        with AT_ONCE:
            view.refresh()
    view.finish()
    return screen


@examples(25)
@given(TEXTS, CUTS, st.sampled_from([40, 80, 200]))
def test_the_screen_is_the_same_however_the_text_arrives(text: str, cuts: list[int], columns: int) -> None:
    streamed = shown(pieces(text, cuts), columns)
    assert streamed.text == shown([text], columns, lines=200).text
    assert not streamed.is_cursor_hidden


@examples(50)
@given(NASTY_TEXTS, CUTS)
def test_no_escape_sequence_of_the_model_is_written(text: str, cuts: list[int]) -> None:
    screen = Screen(40)
    console = screen.console()
    modes: tuple[ReasoningMode, ...] = ("show", "fold")
    for mode in modes:
        with AnswerView(ChatStatus(text), mode, console=console, notes=console) as view:
            for part in pieces(text, cuts):
                view.show(Delta(reasoning=part))
            for part in pieces(text, cuts):
                view.show(Delta(text=part))
            call = ToolCall("1", text, text)
            view.show(Delta(tool_calls=(call,)))
            view.tool_started(call)
            view.refresh()
            view.tool_finished(call, text)
    rest = OWN_SEQUENCES.sub("", screen.written)
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e0fff]", rest)
    assert "\r" not in rest.replace("\r\n", "").replace("\r", "", screen.written.count(END))


def test_a_token_writes_little() -> None:
    screen = Screen(80, 40)
    console = screen.console()
    view = AnswerView(ChatStatus("kimi", 2, 1000), console=console, notes=console)
    largest = 0
    for word in ("word " * 300 + "\n\n" + "- item\n" * 100).split(" "):
        view.show(Delta(text=word + " "))
        before = len(screen.written)
        with AT_ONCE:
            view.refresh()
        largest = max(largest, len(screen.written) - before)
    view.finish()
    assert largest < len(BEGIN + END) + 3 * 80 + 2000  # the list, which comes at once


@pytest.mark.slow
def test_fast_answers_cost_little() -> None:
    screen = Screen(80)
    console = screen.console()
    console.file = open("/dev/null", "w")  # noqa: SIM115
    blocks = ["# Title", "- item **bold** `code`", "```python\nx = 1\n```", "A paragraph of text. " * 20]
    text = "\n\n".join(blocks * 300)
    cpu, start = time.process_time(), time.monotonic()
    with AnswerView(ChatStatus("kimi", 2, 10**6), console=console, notes=console) as view:
        for number in range(5000):
            view.show(Delta(text=text[4 * number : 4 * number + 4]))
            time.sleep(max(0.0, start + number / 1000 - time.monotonic()))
    assert (time.process_time() - cpu) / (time.monotonic() - start) < 0.5  # 0.1 on a machine that is not busy
    console.file.close()
