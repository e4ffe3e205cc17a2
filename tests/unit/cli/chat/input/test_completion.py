"""Completion of commands, their arguments, and files after `@`."""

from __future__ import annotations

from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from kimi_mlx.cli.chat.commands.commands import Command
from kimi_mlx.cli.chat.input.completion import MessageCompleter, complete_files, complete_media_files


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("notes.md", "two words.txt", "two.png", "a b.jpg", ".hidden", "src/main.py", "src/Make.mk", "Read.me"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")


def nothing(argument: str) -> None: ...


def command(name: str, **options: object) -> Command:
    return Command(name, "", "about", nothing, **options)  # pyright: ignore[reportArgumentType]


COMMANDS = [
    command("/set", complete=lambda argument: ("temperature", "top_p", "seed")),
    command("/file", complete=complete_files),
    command("/image", complete=complete_media_files),
    command("/images"),
]


def completed(typed: str) -> list[str]:
    """The line after each completion."""
    completions = MessageCompleter(COMMANDS).get_completions(Document(typed), CompleteEvent())
    return [typed[: len(typed) + completion.start_position] + completion.text for completion in completions]


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        ("/i", ["/image", "/images"]),
        ("//i", []),
        ("text /i", []),
        ("/set t", ["/set temperature", "/set top_p"]),
        ("/set seed 4", []),
        ("/images n", []),
        ("/none n", []),
        ("/file n", ["/file notes.md"]),
        ("/file s", ["/file src/"]),
        ("/file src/", ["/file src/Make.mk", "/file src/main.py"]),
        ("/file src/m", ["/file src/main.py"]),
        ("/file src/ma notes", ["/file src/ma notes.md"]),
        ("/file r", ["/file Read.me"]),  # nothing else fits
        ("/file .", ["/file .hidden"]),
        ("/file two", [r"/file two\ words.txt", "/file two.png"]),
        ("/file two wo", ["/file two words.txt"]),
        (r"/file two\ w", [r"/file two\ words.txt"]),
        ("/image t", ["/image two.png"]),
        ("/image two.png a", [r"/image two.png a\ b.jpg"]),
        ("/image s", ["/image src/"]),
        ("/file none/", []),
        ("/file \x00/", []),
        ("@no", ["@notes.md"]),
        ("see @src/ma", ["see @src/main.py"]),
        (r"see @two\ ", [r"see @two\ words.txt"]),
        ("see @~/no", ["see @~/notes.md"]),
        ("bob@no", []),
        ("plain no", []),
    ],
)
def test_completion(typed: str, lines: list[str]) -> None:
    assert completed(typed) == lines


def test_the_menu_shows_the_last_part_of_a_path() -> None:
    menu = MessageCompleter(COMMANDS).get_completions(Document("@src/"), CompleteEvent())
    assert [completion.display_text for completion in menu] == ["Make.mk", "main.py"]
    menu = MessageCompleter(COMMANDS).get_completions(Document("/image"), CompleteEvent())
    assert [completion.display_meta_text for completion in menu] == ["about", "about"]
