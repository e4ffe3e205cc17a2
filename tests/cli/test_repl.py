"""The conversation on a real pseudo-terminal, and its commands without one."""

from __future__ import annotations

import re
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_mlx.cli.chat.commands.commands import ABOUT_CHARS
from kimi_mlx.cli.chat.input.user_input import UserInput
from kimi_mlx.cli.chat.repl import Repl
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import EngineError, KimiMlxError, RingError
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.chat_model import ChatOptions
from kimi_mlx.session.conversation import Conversation
from tests.cli.conftest import Spawn
from tests.fakes import KIMI_MINI, FixedSession, chat_model_of, conversation_of
from tests.terminal import ALT_ENTER, COMMAND, CONTROLLING_TERMINAL, CTRL_C, CTRL_D, CTRL_J, ENTER, TAB, UP

ROOT = Path(__file__).parents[2]
COLOURS = re.compile(rb"\x1b\[([0-9;]*;)?[349][0-9](;[0-9;]*)?m")

FAKE = (
    CONTROLLING_TERMINAL
    + """
from kimi_mlx.cli.chat.input.user_input import UserInput
from kimi_mlx.cli.chat.repl import run_repl
from kimi_mlx.cli.chat.repl_state import ReplState
from tests.fakes import conversation_of
conversation = conversation_of({answer})
run_repl(ReplState(conversation))
print([message.content for message in conversation.messages if message.role == "user"], flush=True)
"""
)
QUICK = FAKE.format(answer="'The answer.', 'Well, well.'")
ENDLESS = FAKE.format(answer="'on and ', pause_s=0.02, is_endless=True")
STUBBORN = FAKE.format(answer="'on and ', pause_s=0.02, is_endless=True, is_stubborn=True")


@pytest.mark.slow
def test_a_conversation_with_kimi_mini(spawn: Spawn, tmp_path: Path) -> None:
    presets = tmp_path / "config" / "kimi-mlx" / "presets"
    presets.mkdir(parents=True)
    (presets.parent / "config.toml").write_text("[chat]\nmax_tokens = 8\nthinking = false\n")
    (presets / "short.toml").write_text('system = "Be brief."\nseed = 3\n')
    words = ("chat", "kimi-mini", "--preset", "short", "--top-p", "0.9")
    terminal = spawn(COMMAND, *words, XDG_CONFIG_HOME=str(tmp_path / "config"))
    assert "kimi-mini" in terminal.expect("\n> ")
    answer = terminal.ask("hello" + ENTER)
    assert "error" not in answer
    stats = terminal.ask("/stats" + ENTER)
    assert "tok/s" in stats
    assert " 8 tokens in" in stats
    assert "0.7  /set" in terminal.ask("/set temperature 0.7" + ENTER)
    listed = [line.split() for line in terminal.ask("/set" + ENTER).splitlines() if line]
    assert [row for row in listed if row[0] in ("top_p", "seed", "max_tokens")] == [
        ["top_p", "0.9", "option"],
        ["seed", "3", "preset", "short"],
        ["max_tokens", "8", "config.toml"],
    ]
    assert "Be brief." in terminal.ask("/system" + ENTER)
    assert "one process on" in terminal.ask("/model" + ENTER)
    assert "error" not in terminal.ask("again" + ENTER)  # sampled by a model that was loaded for greedy answers
    terminal.send("/quit" + ENTER)
    assert terminal.wait() == 0
    assert terminal.has_old_modes()
    history = tmp_path / "kimi-mlx" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+hello" in history.read_text()


@pytest.mark.slow
def test_a_signal_at_the_prompt_leaves_the_terminal_in_order(spawn: Spawn) -> None:
    terminal = spawn(COMMAND, "chat", "kimi-mini")
    terminal.expect("\n> ")
    terminal.signal(signal.SIGTERM)
    assert terminal.wait() == 128 + signal.SIGTERM
    assert terminal.has_old_modes()


@pytest.mark.slow
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_closed_terminal_ends_the_conversation(spawn: Spawn, term: str) -> None:
    terminal = spawn(COMMAND, "chat", "kimi-mini", TERM=term)
    terminal.expect("\n> ")
    assert terminal.hang_up() == 128 + signal.SIGHUP


@pytest.mark.slow
def test_lines_that_are_typed_ahead_are_sent(spawn: Spawn) -> None:
    terminal = spawn(QUICK)
    terminal.send("first" + ENTER + "second" + ENTER + "unfinished")
    terminal.expect("> first")
    terminal.expect("The answer.")
    terminal.expect("> second")
    terminal.expect("The answer.")
    terminal.expect("> unfinished")
    terminal.send(CTRL_C + CTRL_D)
    terminal.expect("['first', 'second']")


@pytest.mark.slow
def test_messages_of_several_lines(spawn: Spawn) -> None:
    terminal = spawn(QUICK)
    terminal.expect("\n> ")
    answer = terminal.ask("one" + ALT_ENTER + "two" + CTRL_J + "three\\" + ENTER + "four" + ENTER)
    assert "thought for less than 1 s, 6 tokens\nThe answer.\n" in answer
    terminal.ask("\x1b[200~pasted\r\nlines\n/quit\x1b[201~" + ENTER)
    terminal.send(CTRL_D)
    terminal.expect("['one\\ntwo\\nthree\\nfour', 'pasted\\nlines\\n/quit']")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_keys_at_the_prompt(spawn: Spawn, tmp_path: Path) -> None:
    history = tmp_path / "kimi-mlx" / "history"
    history.parent.mkdir()
    history.write_text("\n# 2026-01-01 00:00:00.000000\n+an earlier message\n")
    terminal = spawn(QUICK)
    terminal.expect("\n> ")
    terminal.ask(UP + ENTER)  # from the history of an earlier run
    terminal.send(ENTER + "  " + ENTER + "never sent")
    terminal.expect("never sent")  # before Ctrl-C, which may come before it is drawn
    terminal.send(CTRL_C)
    terminal.ask("café 漢字" + ENTER)
    terminal.send("/sy" + TAB)
    terminal.expect("/system")
    assert "there is no system prompt" in terminal.ask(ENTER)
    assert "Ctrl-C again" in terminal.ask(CTRL_C)
    terminal.send(CTRL_C)
    terminal.expect("['an earlier message', 'café 漢字']")
    assert terminal.wait() == 0
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert not COLOURS.search(terminal.raw)  # the tests set NO_COLOR


def test_ctrl_c_stops_the_answer_and_not_the_program(spawn: Spawn) -> None:
    terminal = spawn(ENDLESS)
    terminal.expect("\n> ")
    terminal.send("first" + ENTER)
    terminal.expect("on and on and ")
    assert terminal.ask(CTRL_C).endswith("\n[stopped]\n\n> ")
    terminal.send("second" + ENTER)
    terminal.expect("on and on and ")
    terminal.send("typed ahead")
    assert "typed ahead" not in terminal.expect("on and on and ")
    terminal.ask(CTRL_C)
    terminal.expect("typed ahead")  # kept for the next message
    terminal.send(CTRL_C + CTRL_D)
    terminal.expect("['first', 'second']")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_a_second_ctrl_c_ends_an_answer_that_does_not_stop(spawn: Spawn) -> None:
    terminal = spawn(STUBBORN)
    terminal.expect("\n> ")
    terminal.send("first" + ENTER)
    terminal.expect("on and on and ")
    terminal.send(CTRL_C)
    terminal.expect("on and on and ")
    terminal.send(CTRL_C)
    terminal.expect("KeyboardInterrupt")
    assert terminal.wait() == -signal.SIGINT
    assert terminal.has_old_modes()


@pytest.mark.slow
def test_a_dumb_terminal(spawn: Spawn) -> None:
    terminal = spawn(QUICK, TERM="dumb")
    terminal.expect("\n> ")
    assert "thought for less than 1 s, 6 tokens\nThe answer.\n" in terminal.ask("one\\\ntwo\n")
    assert "\nPress Ctrl-C again" in terminal.ask(CTRL_C)
    terminal.send(CTRL_D)
    terminal.expect("\n['one\\ntwo']")
    assert terminal.wait() == 0
    assert b"\x1b" not in terminal.raw
    assert "arning" not in terminal.text


@pytest.mark.slow
def test_a_narrow_terminal_and_an_unwritable_history(spawn: Spawn, tmp_path: Path) -> None:
    (tmp_path / "kimi-mlx").write_text("a file where the folder should be")
    terminal = spawn(QUICK, columns=20)
    terminal.expect("\n> ")
    assert "The answer." in terminal.ask("a longer message" + ENTER)
    _, *output = terminal.ask("/help" + ENTER).splitlines()
    assert max(len(line) for line in output) <= 20
    terminal.send(CTRL_D)
    assert terminal.wait() == 0


class Lines:
    """An input line that was typed beforehand."""

    def __init__(self, *lines: str | BaseException):
        self._lines = iter(lines)

    def read(self, draft: str = "", toolbar: Callable[[int], str] | None = None) -> UserInput:
        line = next(self._lines)
        if isinstance(line, BaseException):
            raise line
        return UserInput(line)


def send_all(conversation: Conversation, *lines: str | BaseException) -> None:
    Repl(ReplState(conversation)).run(Lines(*lines, "/quit"))


def users(conversation: Conversation) -> list[object]:
    return [message.content for message in conversation.messages if message.role == "user"]


def failing_conversation(error: KimiMlxError) -> Conversation:
    def fail(request: Request) -> None:
        raise error

    return Conversation(chat_model_of(FixedSession([], before=fail), ChatTokenizer.load(KIMI_MINI)))


def test_reset_clears_messages_and_statistics(capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("yes")
    send_all(conversation, "/stats", "hi", "again", "/stats", "/reset", "/stats")
    output = capfd.readouterr().err
    assert conversation.messages == []
    assert output.count("there is no answer yet") == 2
    assert "conversation: 2 answers · " in output


@pytest.mark.parametrize("word", ["exit", "quit"])
def test_the_word_alone_ends_the_chat(word: str) -> None:
    conversation = conversation_of("yes")
    Repl(ReplState(conversation)).run(Lines(f"how do I {word} vi?", word))
    assert users(conversation) == [f"how do I {word} vi?"]


def test_help_names_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    repl = Repl(ReplState(conversation_of("yes")))
    repl.handle(UserInput("/help"))
    output = capfd.readouterr().err
    assert all(f"{command.name} " in output for command in repl.command_list)
    assert len(output.splitlines()) <= 24
    assert max(map(len, output.splitlines())) <= 80
    assert all(len(command.about) <= ABOUT_CHARS for command in repl.command_list)


def test_help_of_one_command_and_of_the_keys(capfd: pytest.CaptureFixture[str]) -> None:
    repl = Repl(ReplState(conversation_of("yes")))
    repl.handle(UserInput("/help clear"))
    repl.handle(UserInput("/help /reset"))
    repl.handle(UserInput("/help keys"))
    output = capfd.readouterr().err
    assert output.count("start a new conversation\n") == 2
    assert "Also: /new, /reset" in output
    assert "Ctrl-R" in output
    assert not repl.handle(UserInput("/help sytem"))
    assert "try `/system`" in capfd.readouterr().err


def test_an_unknown_command_is_not_sent(capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("yes")
    send_all(conversation, "/clera", "/systen x", "/usr/bin/env is what?", "/")
    output = capfd.readouterr().err
    assert users(conversation) == []
    assert "try `/clear`" in output
    assert "try `/system`" in output
    assert output.count("error: there is no command") == 4


def test_two_slashes_send_one_and_empty_lines_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("yes")
    send_all(conversation, "", " \n ", "//usr/bin", "  indented\n")
    assert users(conversation) == ["/usr/bin", "  indented"]
    assert capfd.readouterr().out == "yes\nyes\n"


def test_a_truncated_answer_has_a_remark(capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("one two three four five six seven")
    conversation.options = ChatOptions(max_tokens=4)
    send_all(conversation, "count")
    assert "[stopped at the token limit]" in capfd.readouterr().err
    send_all(conversation_of(""), "say nothing")
    assert "[no answer]" in capfd.readouterr().err


def test_an_error_is_shown_and_the_conversation_continues(capfd: pytest.CaptureFixture[str]) -> None:
    conversation = failing_conversation(EngineError("the prompt is too long", hint="use /reset"))
    send_all(conversation, "hi", "hi again")
    output = capfd.readouterr().err
    assert output.count("error: the prompt is too long\nhint: use /reset") == 2
    assert conversation.messages == []


def test_a_lost_ring_ends_the_conversation() -> None:
    with pytest.raises(RingError, match="rank 1"):
        send_all(failing_conversation(RingError("rank 1 is gone")), "hi")


def test_ctrl_c_twice_or_the_end_of_input_leaves() -> None:
    send_all(conversation_of("yes"), KeyboardInterrupt(), KeyboardInterrupt(), AssertionError())
    send_all(conversation_of("yes"), KeyboardInterrupt(), "", KeyboardInterrupt(), EOFError(), AssertionError())
    with pytest.raises(AssertionError):
        send_all(conversation_of("yes"), KeyboardInterrupt(), AssertionError())


def test_the_page_of_the_chat_lists_all_commands() -> None:
    page = (ROOT / "docs" / "chat.md").read_text()
    assert all(f"`{command.name}" in page for command in Repl(ReplState(conversation_of("yes"))).command_list)
