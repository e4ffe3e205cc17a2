"""Paths that terminals paste for dropped files."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cli.chat.input.dropped_files import quote_name, read_file_names, split_dropped_files

NAMES = ["plain.png", "two words.png", "it's.png", 'a "quote".png', "back\\slash.png", "Schöne Grüße.png", "(1).png"]
SCREENSHOT = "Screenshot 2026-11-29 at 9.41.00\u202fAM.png"


def percent(path: Path) -> str:
    return path.as_uri()


def backslashes(path: Path) -> str:
    return "".join(f"\\{c}" if c in " '\"\\()" else c for c in str(path))


def single_quotes(path: Path) -> str:
    return "'" + str(path).replace("'", "'\\''") + "'"


def double_quotes(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def shell_quotes(path: Path) -> str:
    return shlex.quote(str(path))


def split(text: str, *files: Path) -> list[str | Path]:
    return split_dropped_files(text, lambda path: path in files)


@pytest.mark.parametrize("form", [percent, backslashes, single_quotes, double_quotes, shell_quotes])
@pytest.mark.parametrize("name", [*NAMES, SCREENSHOT])
def test_every_form_of_a_dropped_file(form: Callable[[Path], str], name: str) -> None:
    path = Path("/Users/me/Desktop") / name
    assert split(f"{form(path)} ", path) == [path]
    assert split(f"What is on {form(path)} and why?", path) == ["What is on", path, "and why?"]


@pytest.mark.parametrize("name", ["plain.png", "two words.png", "it's.png", SCREENSHOT, "a  b   c.png"])
def test_a_path_with_spaces_as_they_are(name: str) -> None:
    path = Path("/home/me") / name
    assert split(f"Describe {path} ", path) == ["Describe", path]
    assert split(f"Is {path}, or not?", path) == ["Is", path, ", or not?"]


def test_several_files_keep_their_places() -> None:
    one, two = Path("/tmp/one.png"), Path("/tmp/two words.png")
    assert split(f"{one} {backslashes(two)} ", one, two) == [one, two]
    assert split(f"Compare {one} with '{two}'.", one) == ["Compare", one, f"with '{two}'."]
    assert split(f"Compare {one} with '{two}'.", one, two) == ["Compare", one, "with", two, "."]
    assert split(f"Compare {one} with\n'{two}' now", one, two) == ["Compare", one, "with", two, "now"]


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert split("~/cat.png", Path("/home/me/cat.png")) == [Path("/home/me/cat.png")]
    assert split("~/my cat.png?", Path("/home/me/my cat.png")) == [Path("/home/me/my cat.png"), "?"]


@pytest.mark.parametrize(
    "text",
    [
        "cat.png",  # relative: may be a word
        "see /tmp/other.png",
        "http://host/tmp/cat.png",
        "file://server/tmp/cat.png",
        "x/tmp/cat.png",
        "'/tmp/cat.png",
        "''",
        '"" \\',
        "file://[bad",
        "  two\n lines  ",
    ],
)
def test_other_text_stays_text(text: str) -> None:
    assert split(text, Path("/tmp/cat.png"), Path("cat.png")) == [text.strip()]


@given(st.text(st.sampled_from("/~'\"\\ \n\tab.png:fileé\u202f"), max_size=60))
def test_any_text_survives(text: str) -> None:
    expected = [stripped] if (stripped := text.strip(" \t\r\n")) else []
    assert split(text) == expected
    assert all(isinstance(name, Path) for name in read_file_names(text or "x"))


def test_a_long_text_is_quick() -> None:
    looked_at: list[Path] = []
    split_dropped_files("/a b " * 100_000, lambda path: bool(looked_at.append(path)))
    assert len(looked_at) < 400
    started = time.process_time()
    split("/" * 1_000_000)
    split("\\" * 1_000_000)
    split("'" * 100_000)
    assert time.process_time() - started < 5


def test_names_after_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain.png", "two words.png", "it's.png"):
        (tmp_path / name).touch()
    assert read_file_names("two words.png ") == [Path("two words.png")]
    assert read_file_names("it's.png") == [Path("it's.png")]
    assert read_file_names(f"{backslashes(tmp_path / 'two words.png')} plain.png ") == [
        tmp_path / "two words.png",
        Path("plain.png"),
    ]
    assert read_file_names("'two words.png'") == [Path("two words.png")]
    assert read_file_names((tmp_path / "two words.png").as_uri()) == [tmp_path / "two words.png"]
    assert read_file_names("no such file.png") == [Path("no such file.png")]
    assert read_file_names("missing.png") == [Path("missing.png")]


def test_names_of_a_command_need_no_backslash_if_they_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one blue.png", "b.png", "[c].png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert read_file_names("one blue.png b.png") == [Path("one blue.png"), Path("b.png")]
    assert read_file_names("b.png one blue.png") == [Path("b.png"), Path("one blue.png")]
    assert read_file_names("*") == [Path("[c].png"), Path("b.png"), Path("one blue.png")]
    assert read_file_names("[c].png *e.png") == [Path("[c].png"), Path("one blue.png")]
    assert read_file_names("b.png bb.png") == [Path("b.png"), Path("bb.png")]  # names the one that is not there
    assert read_file_names("two blue.png b.png") == [Path("two blue.png b.png")]
    assert read_file_names("*.jpg") == [Path("*.jpg")]


@pytest.mark.parametrize("name", [*NAMES, SCREENSHOT, "[c] *.png", "'quoted'.png", "a  b.png"])
def test_a_quoted_name_is_read_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = [Path("first.png"), Path(name), Path("first.png")]
    for file in files:
        file.touch()
    assert read_file_names(f"first.png {quote_name(name)} first.png") == files
