# ruff: noqa: RUF001
"""Text for a terminal: controls removed, cells measured, lines wrapped."""

from __future__ import annotations

import itertools
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wcwidth import iter_graphemes

from kimi_mlx.cli.chat.output.terminal_text import (
    ControlFilter,
    cell_width,
    remove_controls,
    shorten,
    to_line,
    wrap_points,
)

NASTY = "\x1b\x9b\x07\x7f\r\n\t[]m0;1@ aé漢😀"
WORDS = st.text(st.sampled_from("ab  漢字，。「」(é👩‍🚀🇩🇪❤️.-"), max_size=60)


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
        ("\x1b]0;title\x07text", "0;titletext"),
        ("user\u202egpj.exe \u2066x\u2069\u200b\ufeff\U000e0041", "usergpj.exe x"),
        ("می\u200cخواهم ❤️ 👩‍🚀", "می\u200cخواهم ❤️ 👩‍🚀"),
    ],
)
def test_control_sequences_are_removed(text: str, shown: str) -> None:
    assert ControlFilter().add(text) == shown


def test_no_character_of_a_control_category_is_left() -> None:
    everything = remove_controls("".join(map(chr, range(0x110000))))
    left = {character for character in everything if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")}
    assert left == {"\n", "\t"}
    bidirectional = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not [character for character in everything if unicodedata.bidirectional(character) in bidirectional]


def test_a_name_is_one_line() -> None:
    assert to_line(" a\nb\x1b[2J\tc ") == "a b c"


@given(WORDS, st.integers(1, 30))
def test_wrapped_lines_fit_and_lose_only_spaces(text: str, width: int) -> None:
    points = wrap_points(text, width)
    lines = [text[start:end] for start, end in points]
    widest = max((cell_width(grapheme) for grapheme in iter_graphemes(text)), default=0)
    assert all(cell_width(line) <= max(width, widest) for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(a_end <= b_start for (_, a_end), (b_start, _) in itertools.pairwise(points))


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("the architecture of it", 12, ["the", "architecture", "of it"]),
        ("a verylongwordindeed b", 6, ["a", "verylo", "ngword", "indeed", "b"]),
        ("这是一段中文，没有空格。", 10, ["这是一段中", "文，没有空", "格。"]),
        ("看「引号」里", 6, ["看「引", "号」里"]),
        ("MLX 是框架", 8, ["MLX 是框", "架"]),
        ("  indented", 20, ["  indented"]),
        ("", 10, [""]),
    ],
)
def test_lines_are_wrapped(text: str, width: int, lines: list[str]) -> None:
    assert [text[start:end] for start, end in wrap_points(text, width)] == lines


def test_a_line_is_shortened_to_its_cells() -> None:
    assert shorten("漢字漢字", 5) == "漢字…"
    assert shorten("short", 5) == "short"
