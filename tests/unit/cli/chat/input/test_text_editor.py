"""The user's editor: variables, failures, and what it leaves."""

from __future__ import annotations

import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_mlx.cli.chat.input import text_editor
from kimi_mlx.cli.chat.input.text_editor import edit_text
from kimi_mlx.errors import UsageError


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    master, slave = pty.openpty()
    with open(slave) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        monkeypatch.delenv("VISUAL", raising=False)
        yield
    os.close(master)


def script(path: Path, text: str) -> str:
    """Write a shell script that is an editor; the file is `$2`, behind an argument."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def test_the_editor_gets_the_draft_and_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = script(tmp_path / "my editor", 'ls -l "$2" > mode; [ "$1" = "--wait now" ] && printf "more\\r\\n" >> "$2"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDITOR", f"'{editor}' '--wait now'")
    assert edit_text("draft 漢字\n\ud800") == "draft 漢字\n?\nmore"
    assert "message.md" in (tmp_path / "mode").read_text()
    monkeypatch.setenv("VISUAL", f"'{script(tmp_path / 'visual', 'exit 0')}'")
    assert edit_text("unchanged") == "unchanged"


def test_an_empty_file_is_an_empty_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITOR", script(tmp_path / "editor", ': > "$1"'))
    assert edit_text("draft") == ""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("exit 3", "failed with exit code 3"),
        ("kill -INT $$", "was ended by signal 2"),
        ('rm "$1"', "left no message: No such file or directory"),
    ],
)
def test_an_editor_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    monkeypatch.setenv("EDITOR", script(tmp_path / "editor", code))
    with pytest.raises(UsageError, match=message):
        edit_text("draft")


@pytest.mark.parametrize(
    ("editor", "message"),
    [("no-such-editor -w", "there is no editor `no-such-editor`, which EDITOR names"), ("'vi", "No closing quotation")],
)
def test_an_editor_that_is_not_there(monkeypatch: pytest.MonkeyPatch, editor: str, message: str) -> None:
    monkeypatch.setenv("EDITOR", editor)
    with pytest.raises(UsageError, match=message):
        edit_text("draft")


def test_without_variables_there_are_nano_and_vi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDITOR", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="there is no editor"):
        edit_text("draft")
    script(tmp_path / text_editor.FALLBACKS[-1], "exit 0")
    assert edit_text("draft") == "draft"
