"""`kimi-mlx chat` between pipes: files and piped input in, one answer out, and an end as soon as nobody reads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Spawn
from tests.command import call
from tests.processes import start
from tests.terminal import COMMAND, CTRL_D

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "two-red-circles.png"
CHAT = [sys.executable, "-m", "kimi_mlx", "chat"]
ANSWER = ("-t", "0", "--no-thinking", "--max-tokens", "2", "--json")
BROKEN_PIPE = 128 + signal.SIGPIPE
SOON_S = 20.0
"""An endless answer would take for ever."""


def num_prompt_tokens(*arguments: str, stdin: str | None = None) -> int:
    """Return the size of a prompt, whatever the answer is: the toy model may begin a tool call."""
    return json.loads(call("chat", *arguments, *ANSWER, stdin=stdin).stdout)["usage"]["prompt_tokens"]


def test_files_stand_before_the_prompt_and_the_pipe_after_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three\n")
    (tmp_path / "b.txt").write_text("four five six\n")
    a, b = (str(tmp_path / f"{name}.txt") for name in "ab")
    whole = f"File: {a}\n```\none two three\n```\n\nFile: {b}\n```\nfour five six\n```\n\nHi\n\nseven"
    assert num_prompt_tokens("-f", a, "-f", b, "-p", "Hi", stdin="seven") == num_prompt_tokens("-p", whole)


@pytest.mark.slow
def test_the_pipe_is_a_file_or_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three\n")
    whole = f"File: {tmp_path}/a.txt\n```\none two three\n```\n\nHi\n\nseven"
    assert num_prompt_tokens("-f", str(tmp_path / "a.txt"), stdin="Hi\n\nseven") == num_prompt_tokens("-p", whole)
    attached = "File: piped input\n```\nseven\n```\n\nHi"
    assert num_prompt_tokens("-f", "-", "-p", "Hi", stdin="seven") == num_prompt_tokens("-p", attached)


@pytest.mark.slow
def test_files_are_attached_to_the_first_message_of_a_conversation(tmp_path: Path, spawn: Spawn) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("one two three\n")
    terminal = spawn(COMMAND, "chat", "--no-log", "-f", str(path))
    terminal.expect("notes.txt")
    terminal.expect("tokens")
    terminal.expect("> ")
    terminal.send(CTRL_D)
    assert terminal.wait() == 0


@pytest.mark.slow
def test_an_image_is_known_by_its_name() -> None:
    by_name = num_prompt_tokens("kimi-mini-vl", "-f", str(PICTURE), "-p", "What?")
    assert by_name == num_prompt_tokens("kimi-mini-vl", "-i", str(PICTURE), "-p", "What?")


@pytest.mark.slow
def test_a_system_prompt_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "system.txt"
    path.write_text("Answer in French.\n")
    from_file = num_prompt_tokens("--system-file", str(path), "-p", "Hi")
    assert from_file == num_prompt_tokens("-s", "Answer in French.", "-p", "Hi")


@pytest.mark.sweep
def test_text_in_another_encoding_is_read() -> None:
    for data in ("Was heißt café?".encode("latin-1"), "Was heißt café?".encode("utf-16")):
        done = subprocess.run([*CHAT, "-p", "Hi", *ANSWER], input=data, capture_output=True, timeout=60, check=False)
        expected = num_prompt_tokens("-p", "Hi\n\nWas heißt café?")
        assert json.loads(done.stdout)["usage"]["prompt_tokens"] == expected


@pytest.mark.slow
def test_an_empty_pipe_is_reported() -> None:
    done = call("chat", "-p", "Hi", "-t", "0", stdin="")
    assert done.returncode == 0
    assert "the piped input is empty" in done.stderr
    assert "the piped input" not in call("chat", "-p", "Hi", "-q", stdin="").stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        ((), "", "the prompt is empty"),
        (("-p", "-"), None, "`-p -` reads piped input, but nothing is piped"),
        (("-p", "Hi", "-f", "-"), None, "`-f -` reads piped input, but nothing is piped"),
        (("-f", "-"), "text", "attaches the piped input to a prompt, and there is none"),
        (("-f", "-", "-p", "-"), "text", "the piped input can be used only once"),
        (("-p", "Hi", "-f", "no.txt"), None, "there is no file `no.txt`"),
        (("-p", "Hi", "-f", "/"), None, "`/` is a folder, not a text file"),
        (("-p", "Hi", "-s", "a", "--system-file", "b"), None, "--system and --system-file exclude each other"),
        (("-p", "Hi", "--system-file", "no.txt"), None, "there is no file `no.txt`"),
        (("-p", "Hi", "--schema", '{"type": "text"}'), None, "`--schema: $"),
        (("-p", "Hi"), "a\0b", "the piped input is not text: byte 1 is zero"),
    ],
)
def test_wrong_input_is_a_usage_error_before_the_model_is_loaded(
    arguments: tuple[str, ...], stdin: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_mlx.session.open.open_session", lambda *args: pytest.fail("the model was loaded"))
    done = call("chat", *arguments, stdin=stdin)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_a_huge_prompt_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_mlx.session.open.open_session", lambda *args: pytest.fail("the model was loaded"))
    done = call("chat", "-p", "Hi", "--json", stdin="word " * 3_000_000)
    assert done.returncode == 1
    assert "tokens, but the context holds 65536" in json.loads(done.stdout)["error"]


def test_an_answer_of_a_schema_is_json_after_reasoning() -> None:
    done = call("chat", "-q", "-t", "0", "-p", "Hi", "--schema", '{"enum": ["yes", "no"]}')
    assert json.loads(done.stdout) in ("yes", "no")
    assert done.stderr == ""


@pytest.mark.slow
def test_input_through_a_socket_is_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        chat = start([*CHAT, *ANSWER], stdin=theirs.fileno())
        theirs.close()
        ours.sendall(b"Hi")
        ours.shutdown(socket.SHUT_WR)
        output, _ = chat.communicate(timeout=60)
    assert json.loads(output)["usage"]["prompt_tokens"] == num_prompt_tokens("-p", "Hi")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("--no-stream",), (), ("--json",)],
)
def test_an_answer_without_a_reader_ends_soon(endless_model: Path, options: tuple[str, ...]) -> None:
    chat = start([*CHAT, str(endless_model), "-p", "Hi", "-t", "0", "--no-thinking", *options])
    assert chat.stdout is not None
    if options:
        time.sleep(1.0)  # it is loading or answering
    else:
        chat.stdout.read(1)
    chat.stdout.close()
    assert chat.wait(SOON_S) == BROKEN_PIPE
    assert chat.stderr is not None
    assert chat.stderr.read() == b""


@pytest.mark.slow
def test_input_that_never_ends_is_an_error() -> None:
    reading, writing = os.pipe()
    yes = start(["yes"], stdout=writing)
    os.close(writing)
    done = subprocess.run([*CHAT, "-p", "Hi"], stdin=reading, capture_output=True, text=True, timeout=60, check=False)
    os.close(reading)
    assert done.returncode == 2
    assert "larger than the limit of 16.0 MB" in done.stderr
    assert yes.wait(10) == -signal.SIGPIPE
