"""Files that a message mentions as `@path`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_mlx.cli.chat.input.mentions import find_mentions, mention_start
from kimi_mlx.cli.chat.input.user_input import UserInput


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "src").mkdir()
    for name in ("a.py", "two words.txt", "it's.md", "src/b.c", "README", "end.", "漢字.txt", "(x).txt"):
        (tmp_path / name).write_text("x")
    return tmp_path


def mentioned(text: str, *pasted: range) -> list[tuple[str, bool]]:
    """Paths, and whether they exist."""
    return [(str(mention.path), mention.exists) for mention in find_mentions(UserInput(text, pasted))]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("@a.py", "a.py"),
        ("see @a.py, please", "a.py"),
        ("(@src/b.c).", "src/b.c"),
        ("what is @README?", "README"),
        ("see @end. Now", "end."),
        ('@"two words.txt" and', "two words.txt"),
        (r"@two\ words.txt", "two words.txt"),
        ('@"it\'s.md"', "it's.md"),
        ("@漢字.txt", "漢字.txt"),
        ("@(x).txt", "(x).txt"),
        ("lines\n@a.py\n", "a.py"),
        ("`@a.py`", "a.py"),
    ],
)
def test_a_path_that_exists(text: str, path: str) -> None:
    assert mentioned(text) == [(path, True)]
    (mention,) = find_mentions(UserInput(text))
    assert text[mention.start] == "@"
    assert path in text[mention.start : mention.end].replace("\\", "")


def test_home_and_absolute_paths(folder: Path) -> None:
    assert mentioned("@~/a.py") == [(str(folder / "a.py"), True)]
    assert mentioned(f"@{folder}/a.py.") == [(f"{folder}/a.py", True)]


@pytest.mark.parametrize("text", ["@b.py", "@b.py,", "@src/c", "@./x", "@~/none", "@/none/x", "@photo.png", "@a.pyi"])
def test_what_looks_like_a_path_and_does_not_exist(text: str) -> None:
    assert [exists for _, exists in mentioned(text)] == [False]


@pytest.mark.parametrize(
    "text",
    [
        "bob@example.org",
        "user@a.py",
        "@user and @dataclass",
        "@app.route('/x')",
        "@pytest.mark.slow",
        "npm i @types/node @babel/core",
        "@@ -1,3 +1,4 @@",
        "me @ home",
        "@",
        "@'unclosed",
        r"\@user",
        "@param x",
        "@Override",
        "git@github.com:a.py",
        "@\x00",
        "@" + "x" * 10_000,
        "here @. or @/ or @..",
    ],
)
def test_ordinary_text(text: str) -> None:
    assert mentioned(text) == []


def test_a_backslash_means_text() -> None:
    (mention,) = find_mentions(UserInput(r"see \@a.py"))
    assert (mention.is_escaped, mention.start) == (True, 4)


def test_pasted_blocks_mention_nothing() -> None:
    text = "@a.py\n@src/b.c"
    assert mentioned(text, range(6, len(text))) == [("a.py", True)]


def test_very_many_mentions_cost_little() -> None:
    assert len(mentioned("@a.py " * 100_000)) == 256


@pytest.mark.parametrize(
    ("typed", "start"),
    [("@", 1), ("see @sr", 5), (r"@two\ w", 1), ("a@b", None), ("@a b", None), ("(@a", 2), ("", None)],
)
def test_a_mention_that_is_being_typed(typed: str, start: int | None) -> None:
    assert mention_start(typed) == start
