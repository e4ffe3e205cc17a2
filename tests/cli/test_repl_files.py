"""Text files in the conversation: commands, mentions as `@path`, and refusals that give the message back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from kimi_mlx.cli.chat.input.user_input import UserInput
from kimi_mlx.cli.chat.repl import Repl
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.session.conversation import Conversation
from tests.cli.conftest import Spawn
from tests.fakes import conversation_of
from tests.terminal import CONTROLLING_TERMINAL, CTRL_C, CTRL_D, ENTER

ENDLESS = (
    CONTROLLING_TERMINAL
    + """
from kimi_mlx.cli.chat.repl import run_repl
from kimi_mlx.cli.chat.repl_state import ReplState
from tests.fakes import conversation_of
conversation = conversation_of('on and ', pause_s=0.02, is_endless=True)
run_repl(ReplState(conversation))
print([len(message.content) for message in conversation.messages if message.role == "user"], flush=True)
"""
)


class Lines:
    """An input line that was typed beforehand; remembers the drafts that it was given."""

    def __init__(self, *lines: UserInput):
        self._lines = iter(lines)
        self.drafts: list[str] = []

    def read(self, draft: str = "", toolbar: Callable[[int], str] | None = None) -> UserInput:
        self.drafts.append(draft)
        return next(self._lines)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text("pass\n")
    (tmp_path / "two words.txt").write_bytes("Löwe".encode("latin-1"))
    (tmp_path / "src").mkdir()
    (tmp_path / "program").write_bytes(b"\x7fELF\0")
    os.mkfifo(tmp_path / "pipe")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    return tmp_path


def type_lines(conversation: Conversation, *lines: str | UserInput) -> list[str]:
    """Send lines; returns the draft before each of them, and before `/quit`."""
    typed = Lines(*(UserInput(line) if isinstance(line, str) else line for line in (*lines, "/quit")))
    Repl(ReplState(conversation)).run(typed)
    return typed.drafts


def sent(conversation: Conversation) -> list[object]:
    """The user's messages: text, or the texts and the types of their parts."""
    contents = [message.content for message in conversation.messages if message.role == "user"]
    return [
        content if isinstance(content, str) else [part.get("text", part["type"]) for part in content or ()]
        for content in contents
    ]


A_PY = "File: a.py\n```\npass\n```\n\n"


def test_a_mentioned_file_stands_before_the_message(capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("yes")
    type_lines(conversation, "what is in @a.py, and in @'two words.txt'?", "and now?")
    assert sent(conversation) == [
        [A_PY, "File: two words.txt\n```\nLöwe\n```\n\n", "what is in a.py, and in two words.txt?"],
        "and now?",
    ]
    output = capfd.readouterr().err
    assert "a.py · 5 B · " in output
    assert "two words.txt · 4 B, Latin-1 · " in output


def test_the_model_reads_file_and_message_as_one_text() -> None:
    conversation = conversation_of("yes")
    type_lines(conversation, "what is @a.py?")
    parts = conversation.model.count_tokens(conversation.messages, conversation.options)
    conversation.messages.clear()
    type_lines(conversation, f"{A_PY}what is a.py?")
    assert parts == conversation.model.count_tokens(conversation.messages, conversation.options)


def test_a_command_attaches_files_to_the_next_message(capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("yes")
    type_lines(conversation, "/file a.py two\\ words.txt", "what?", "/files", "/files drop 1", "/files")
    assert sent(conversation) == [["File: two words.txt\n```\nLöwe\n```\n\n", "what?"]]
    output = capfd.readouterr().err
    assert "1  a.py           5 B" in output
    assert "dropped a.py" in output


def test_a_message_of_files_only_waits_for_its_text() -> None:
    conversation = conversation_of("yes")
    type_lines(conversation, "@a.py ", "what is it?")
    assert sent(conversation) == [[A_PY, "what is it?"]]


def test_a_pattern_means_all_files() -> None:
    conversation = conversation_of("yes")
    type_lines(conversation, "/file *.py", "what?")
    assert sent(conversation) == [[A_PY, "what?"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("see @src", "`src` is a folder, not a text file"),
        ("see @program", "`program` is not a text file: byte 4 is zero"),
        ("see @pipe", "`pipe` is a pipe, not a file"),
        ("see @red.png", "this model does not see images"),
        ("/file none.txt", "there is no file `none.txt`"),
        ("/file src", "`src` is a folder"),
        ("/file red.png", "attach it with `/image`"),
        ("/file", "/file needs a file"),
        ("/file large.txt", "tokens, and the context has 65,536"),
        ("see @large.txt and @a.py", "tokens, and the context has 65,536"),
    ],
)
def test_a_refused_file_gives_the_message_back(
    folder: Path, line: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if "large" in line:
        (folder / "large.txt").write_text("many words of a text " * 30_000)
    conversation = conversation_of("yes")
    assert type_lines(conversation, line) == ["", line]
    assert conversation.messages == []
    assert message in capfd.readouterr().err


def test_ordinary_text_is_sent_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("yes")
    lines = ["mail bob@example.org and @user", "@dataclass\nclass A: ...", "a @@ -1 +1 @@ b"]
    type_lines(conversation, *lines, r"see \@a.py", "where is @b.py?")
    assert sent(conversation) == [*lines, "see @a.py", "where is @b.py?"]
    assert "there is no file `b.py`: @b.py is sent as text" in capfd.readouterr().err


def test_a_pasted_block_is_sent_exactly() -> None:
    conversation = conversation_of("yes")
    block = "/usr/bin: @a.py\n\n"
    pasted = UserInput(f"see {block}", (range(4, 4 + len(block)),))
    type_lines(conversation, pasted, UserInput(block, (range(len(block)),)))
    assert sent(conversation) == [f"see {block}", block]


def test_an_image_is_mentioned_in_its_place() -> None:
    conversation = conversation_of("yes", sees_images=True)
    type_lines(conversation, "is @red.png red, as @a.py says?")
    assert sent(conversation) == [[A_PY, "is", "image", "red, as a.py says?"]]


@pytest.mark.slow
def test_an_editor_makes_the_next_draft(folder: Path, monkeypatch: pytest.MonkeyPatch, spawn: Spawn) -> None:
    editor = folder / "editor"
    editor.write_text('#!/bin/sh\necho more >> "$1"\n')
    editor.chmod(0o700)
    terminal = spawn(ENDLESS, EDITOR=str(editor))
    terminal.expect("\n> ")
    terminal.send("/edit a draft" + ENTER)
    terminal.screen(100, "> a draft\n  more")
    monkeypatch.setenv("EDITOR", "no-such-editor")
    assert type_lines(conversation_of("yes"), "/edit a draft") == ["", "/edit a draft"]


@pytest.mark.slow
def test_a_text_that_is_pasted_during_an_answer_is_one_message(spawn: Spawn) -> None:
    terminal = spawn(ENDLESS)
    terminal.expect("\n> ")
    terminal.send("first" + ENTER)
    terminal.expect("on and on and ")
    text = "line of a text\r" * 10_000  # more than a terminal holds
    terminal.send(f"typed \x1b[200~{text}\x1b[201~")
    terminal.expect("on and on and ")
    terminal.send(CTRL_C)
    assert "line of a text" not in terminal.screen(100, "> typed [pasted 10,000 lines]")
    terminal.send(ENTER)
    terminal.expect("on and on and ")
    terminal.ask(CTRL_C)
    terminal.send(CTRL_D)
    terminal.expect("[5, 150006]")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_a_program_that_was_suspended_keeps_what_is_typed(spawn: Spawn) -> None:
    terminal = spawn(ENDLESS)
    terminal.expect("\n> ")
    terminal.send("first" + ENTER)
    terminal.expect("on and on and ")
    terminal.restore_modes()
    terminal.signal(signal.SIGCONT)
    terminal.expect("on and on and ")
    terminal.send("typed")
    terminal.expect("on and on and ")
    terminal.ask(CTRL_C)
    terminal.screen(100, "> typed")
    terminal.send(CTRL_C + CTRL_D)
    assert terminal.wait() == 0
    assert terminal.has_old_modes()
