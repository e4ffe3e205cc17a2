"""One answer: plain text, reasoning, tool calls and progress."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import pytest
from rich.console import Console
from rich.text import Text

from kimi_mlx.cli.chat.output.answer_view import AnswerView, ReasoningMode, is_plain
from kimi_mlx.cli.chat.output.chat_status import ChatStatus
from kimi_mlx.cli.chat.output.statistics_text import describe_experts, statistics_line
from kimi_mlx.engine.events import Encoded, Finished, Interrupted, Prefilled, Resumed, Statistics
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.session.chat_model import ChatEvent
from kimi_mlx.text.messages import Delta, ToolCall, UnparsedToolCall

STATISTICS = Statistics(
    prompt_tokens=41,
    cached_tokens=12,
    generated_tokens=28,
    ttft_s=0.2,
    decode_s=0.9,
    peak_memory_bytes=3 * 10**8,
)


class TerminalFile(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal that records its input."""
    monkeypatch.setenv("TERM", "xterm-256color")
    return Console(file=TerminalFile(), force_terminal=True, highlight=False, soft_wrap=True, width=80)


@pytest.fixture
def pipe() -> Console:
    """A console that is no terminal."""
    return Console(file=io.StringIO(), force_terminal=False, highlight=False, soft_wrap=True, width=80)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def wait_for(text: str, console: Console) -> None:
    deadline = time.monotonic() + 5
    while text not in written(console):
        assert time.monotonic() < deadline, written(console)
        time.sleep(0.01)


def show_plain(console: Console, notes: Console, *events: ChatEvent, reasoning: ReasoningMode = "fold") -> str:
    with AnswerView(reasoning=reasoning, plain=True, console=console, notes=notes) as view:
        for event in events:
            view.show(event)
        view.show(Finished("stop", STATISTICS))
    return written(console)


def test_a_pipe_gets_exactly_the_text(pipe: Console, terminal: Console) -> None:
    text = "\n[bold]no markup[/bold] :smile:\t" + "long " * 40 + "\x1b[31m\r\n\n  end"
    shown = show_plain(pipe, terminal, *(Delta(text=character) for character in text))
    assert shown == text + "\n"
    assert show_plain(pipe, terminal, Delta(text="\n")).endswith("end\n\n")


def test_a_plain_terminal_gets_no_control_sequence(terminal: Console, pipe: Console) -> None:
    shown = show_plain(terminal, pipe, Delta(text="a\x1b"), Delta(text="[2Jb\u202ec"))
    assert shown == "abc\n"


def test_reasoning_of_a_plain_answer(terminal: Console, pipe: Console) -> None:
    events = (Delta(reasoning="Let "), Delta(reasoning="me."), Delta(text="42"))
    assert show_plain(pipe, terminal, *events) == "42\n"
    assert "thought for less than 1 s, 2 tokens" in written(terminal)
    show_plain(pipe, terminal, *events, reasoning="show")
    assert Text.from_ansi(written(terminal)).plain.endswith("thinking:\nLet me.\n\n")


@pytest.mark.parametrize("mode", ["show", "hide", "fold"])
def test_a_log_has_no_reasoning(pipe: Console, mode: ReasoningMode) -> None:
    log = Console(file=io.StringIO())
    show_plain(pipe, log, Delta(reasoning="hm"), Delta(text="42"), reasoning=mode)
    assert written(log) == ""


def test_tool_calls_of_a_plain_answer_are_not_in_the_text(pipe: Console) -> None:
    log = Console(file=io.StringIO(), width=80)
    first = ToolCall("functions.weather:0", "weather", '{"city": "Paris", "名": "\\u001b[31m"}')
    second = UnparsedToolCall("functions.\x1b[31mx", "no arguments")
    shown = show_plain(pipe, log, Delta(text="I look it up.\n"), Delta(tool_calls=(first, second)))
    assert shown == "I look it up.\n"
    assert 'tool call weather(city: "Paris", 名: "\\u001b[31m")' in written(log)
    assert "broken tool call (no arguments):\n  functions.x" in written(log)


def test_an_empty_answer_prints_nothing(pipe: Console) -> None:
    assert show_plain(pipe, pipe) == ""


def test_a_slow_prompt_has_a_status_that_goes_away(pipe: Console, terminal: Console) -> None:
    status = ChatStatus("kimi", context=1000)
    with AnswerView(status, console=pipe, notes=terminal) as view:
        view.show(Encoded(image=1, num_images=2, done=3, total=12))
        wait_for("image 1 of 2: encoding", terminal)
        view.show(Prefilled(40, 100))
        wait_for("reading 40 of 100 tokens", terminal)
        assert status.used == 100
        view.show(Prefilled(100, 100))
        view.show(Delta(text="4"))
        view.show(Delta(text="2"))
    assert written(terminal).endswith("\x1b[J\r\x1b[?25h\x1b[?7h\x1b[?2026l")  # the line is erased, the cursor back
    assert status.activity is None


def test_a_quick_answer_shows_no_status(pipe: Console, terminal: Console) -> None:
    assert show_plain(pipe, terminal, Prefilled(0, 100), Prefilled(100, 100), Delta(text="42")) == "42\n"
    assert written(terminal) == ""


def test_an_interruption_is_noted(pipe: Console) -> None:
    log = Console(file=io.StringIO(), width=80)
    interrupted = Interrupted("rank 1 (`mac-b`) is lost\x1b[2J", 1, 3, 5.0)
    show_plain(pipe, log, Delta(text="a"), interrupted, Resumed(12.0), Delta(text="b"))
    assert written(pipe) == "ab\n"
    assert written(log) == (
        "rank 1 (`mac-b`) is lost\nreconnecting in 5 s, attempt 1 of 3\nthe answer continues after 12 s\n"
    )


def test_which_consoles_are_plain(terminal: Console, pipe: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_plain(pipe)
    assert is_plain(terminal)  # the tests set NO_COLOR
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not is_plain(Console(file=TerminalFile()))
    assert is_plain(Console(file=TerminalFile()), option=True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert is_plain(Console(file=io.StringIO()))
    monkeypatch.setenv("TERM", "dumb")
    assert is_plain(Console(file=TerminalFile()))


def test_statistics_line() -> None:
    assert statistics_line(STATISTICS) == (
        "28 tokens in 900 ms · 30.0 tok/s · prompt 41 (12 cached) at 145.0 tok/s · first token 200 ms · peak 286.1 MiB"
    )
    one = Statistics(5, 0, 1, ttft_s=0.5, decode_s=0.0, peak_memory_bytes=10)
    assert statistics_line(one) == "1 token in 0 ms · prompt 5 at 10.0 tok/s · first token 500 ms · peak 10 B"
    drafted = replace(STATISTICS, decode_steps=10, drafted_tokens=20, accepted_tokens=17)
    assert "tokens per step · 17 of 20 draft tokens accepted · prompt" in statistics_line(drafted)


def test_experts_on_the_disk() -> None:
    stats = ExpertStats(hits=3, misses=1, wait_seconds=0.5)
    assert describe_experts(stats, 2e6, 2.0) == (
        "hit rate of experts 75%, 2.0 MB read per token, 25% of the time waiting"
    )
    stats = replace(stats, guesses=8, guesses_right=3)
    assert describe_experts(stats, 2e6, 0) == "hit rate of experts 75%, 2.0 MB read per token, 38% of guesses right"
