from __future__ import annotations

import io
import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kimi_mlx.cli.chat import stream
from kimi_mlx.cli.chat.statistics_text import statistics_line
from kimi_mlx.cli.chat.stream import (
    AnswerPrinter,
    ControlFilter,
    PromptProgress,
    format_tool_call,
)
from kimi_mlx.engine.events import Encoded, Finished, Prefilled, Statistics
from kimi_mlx.text.messages import Delta, ToolCall, UnparsedToolCall

STATISTICS = Statistics(
    prompt_tokens=41,
    cached_tokens=12,
    generated_tokens=28,
    ttft_s=0.2,
    decode_s=0.9,
    peak_memory_bytes=3 * 10**8,
)
NASTY = "\x1b\x9b\x07\x7f\r\n\t[]m0;1@ aé漢😀"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal with colours that records its input."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR")
    return Console(file=io.StringIO(), force_terminal=True, highlight=False, soft_wrap=True, width=20)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def wait_for(text: str, console: Console) -> None:
    deadline = time.monotonic() + 5
    while text not in written(console):
        assert time.monotonic() < deadline, written(console)
        time.sleep(0.01)


def plain_console() -> Console:
    return Console(file=io.StringIO(), highlight=False, soft_wrap=True, width=20)


def show_all(console: Console, *deltas: Delta, show_reasoning: bool = True, plain: bool = False) -> str:
    with AnswerPrinter(console, show_reasoning, plain) as printer:
        for delta in deltas:
            printer.show(delta)
        printer.show(Finished("stop", STATISTICS))
    return written(console)


@given(st.text(st.sampled_from(NASTY), max_size=60), st.lists(st.integers(0, 60), max_size=8))
def test_control_characters_never_pass_and_cuts_change_nothing(text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(text)]
    whole, streamed = ControlFilter(), ControlFilter()
    expected = whole.add(text)
    assert "".join(streamed.add(text[a:b]) for a, b in itertools.pairwise(edges)) == expected
    assert not set(expected) & set("\x1b\x9b\x07\x7f\r")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n  漢字 👩‍🚀", "plain\ttext\n  漢字 👩‍🚀"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("up\x1b[2Aclear\x1b[2J", "upclear"),
        ("a\r\nb\x00\x08c\x85d", "a\nbcd"),
        ("\x9b31mred", "red"),
        ("reset\x1bcall", "resetall"),
        ("an unfinished one is no text\x1b[31", "an unfinished one is no text"),
        ("\x1b[" + "1" * 100, "1" * 100),
    ],
)
def test_control_sequences_are_removed(text: str, shown: str) -> None:
    assert ControlFilter().add(text) == shown


def test_text_arrives_exactly(terminal: Console) -> None:
    text = "[bold]no markup[/bold] :smile:\tand a line much longer than the terminal is wide  \n\n  end"
    assert show_all(terminal, *(Delta(text=character) for character in text)) == text + "\n"


def test_the_plain_answer_is_alone_on_its_console(capsys: pytest.CaptureFixture[str]) -> None:
    shown = show_all(plain_console(), Delta(reasoning="Let me see."), Delta(text="\n\n42\n\n"), plain=True)
    assert shown == "42\n"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Let me see." in captured.err


def test_hidden_reasoning_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_all(plain_console(), Delta(reasoning="hm"), Delta(text="42"), show_reasoning=False) == "42\n"
    assert capsys.readouterr().err == ""


def test_reasoning_is_dimmed_and_named(terminal: Console) -> None:
    shown = show_all(terminal, Delta(reasoning="Let "), Delta(reasoning="me.\n"), Delta(text="42"))
    assert "\x1b[2mLet \x1b[0m\x1b[2mme.\x1b[0m" in shown
    assert show_all(plain_console(), Delta(reasoning="Let me.\n"), Delta(text="42")) == "thinking:\nLet me.\n\n42\n"


def test_without_colour_there_are_no_colour_codes(terminal: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    dumb = Console(file=io.StringIO(), force_terminal=True, soft_wrap=True)
    assert "\x1b" not in show_all(dumb, Delta(reasoning="hm"), Delta(text="42"))


def test_tool_calls_are_parts_of_their_own() -> None:
    first = ToolCall("functions.weather:0", "weather", '{"city": "Paris", "名": "\\u001b[31m"}')
    second = UnparsedToolCall("functions.\x1b[31mx", "no arguments")
    shown = show_all(plain_console(), Delta(text="I look it up.\n"), Delta(tool_calls=(first, second)), plain=True)
    assert shown == (
        'I look it up.\n\ntool call weather\n  {\n    "city": "Paris",\n    "名": "\\u001b[31m"\n  }\n\n'
        "broken tool call (no arguments):\n  functions.x\n"
    )


def test_arguments_that_are_no_json_are_shown_as_they_are() -> None:
    assert format_tool_call(ToolCall("1", "f", "{not json")) == "tool call f\n  {not json"
    deep = "[" * 100_000
    assert format_tool_call(ToolCall("1", "f", deep)).endswith(deep)
    assert json.loads(format_tool_call(ToolCall("1", "f", "{}")).removeprefix("tool call f")) == {}


def test_an_empty_answer_prints_nothing() -> None:
    assert show_all(plain_console(), Delta(text="\n"), Delta(text="\n")) == ""


def test_statistics_line() -> None:
    assert statistics_line(STATISTICS) == (
        "28 tokens in 900 ms · 30.0 tok/s · prompt 41 (12 cached) at 145.0 tok/s · first token 200 ms · peak 300.0 MB"
    )
    one = Statistics(5, 0, 1, ttft_s=0.5, decode_s=0.0, peak_memory_bytes=10)
    assert statistics_line(one) == "1 token in 0 ms · prompt 5 at 10.0 tok/s · first token 500 ms · peak 10 B"


def test_a_slow_prompt_shows_a_bar_that_goes_away(terminal: Console) -> None:
    terminal.width = 80
    progress = PromptProgress(terminal, after_s=0.01)
    progress.start()
    wait_for("processing the prompt", terminal)  # before the first event
    progress.update(Encoded(image=1, num_images=2, done=3, total=12))
    wait_for("encoding image 1 of 2", terminal)
    wait_for("25%", terminal)
    progress.update(Encoded(image=2, num_images=2, done=12, total=12))
    progress.update(Prefilled(40, 100))
    wait_for("40/100 tokens", terminal)
    progress.update(Prefilled(100, 100))
    assert "processing the prompt" in written(terminal)
    assert written(terminal).endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor is back, the line empty


def test_a_quick_prompt_shows_no_bar(terminal: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "stderr", terminal)
    with AnswerPrinter(plain_console(), show_reasoning=True, plain=True) as printer:
        printer.show(Prefilled(0, 100))
        printer.show(Prefilled(50, 100))
    assert written(terminal) == ""


def test_a_bar_is_for_terminals_only() -> None:
    console = plain_console()
    progress = PromptProgress(console, after_s=0.0)
    progress.start()
    progress.update(Prefilled(0, 100))
    time.sleep(0.05)
    progress.stop()
    assert written(console) == ""
