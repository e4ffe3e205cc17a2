"""A terminal's tail that is redrawn: what has become final stays, and what is written is little."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cli.chat.output.live_region import BEGIN, END, LiveRegion, Row, Size, wraps_again
from tests.examples import examples
from tests.screen import Screen

LINES = 8
WORDS = st.sampled_from(["", "a", "row", "漢字", "a longer row", "x" * 20, "x" * 19 + "y"])
UPDATES = st.lists(st.tuples(st.lists(WORDS, max_size=5), st.lists(WORDS, max_size=12)), max_size=8)


def row(text: str) -> Row:
    return Row(text, sum(2 if ord(character) > 0x2000 else 1 for character in text))


def region_of(screen: Screen, columns: int = 20, lines: int = LINES) -> LiveRegion:
    return LiveRegion(screen, lambda: Size(columns, lines))


def trimmed(rows: list[str]) -> list[str]:
    while rows and not rows[-1]:
        rows = rows[:-1]
    return rows


@examples(60)
@given(st.integers(0, 10), UPDATES)
def test_final_rows_stay_and_the_tail_is_below(above: int, updates: list[tuple[list[str], list[str]]]) -> None:
    screen = Screen(20, LINES)
    expected = [f"above {number}" for number in range(above)]
    screen.write("".join(f"{text}\n" for text in expected))
    region = region_of(screen)
    tail: list[str] = []
    for final, new_tail in updates:
        screen.first_changed_row()
        region.update([row(text) for text in final], [row(text) for text in new_tail])
        assert screen.first_changed_row() >= len(expected)
        expected, tail = expected + final, new_tail[-(LINES - 1) :]
        assert screen.rows == trimmed(expected + tail)
        assert screen.is_cursor_hidden == bool(tail)
    region.close()
    assert screen.rows == trimmed(expected)
    screen.write("next")
    assert screen.rows == [*expected, "next"]


def test_only_changed_rows_are_written() -> None:
    screen = Screen(20)
    region = region_of(screen, lines=24)
    rows = [row(f"row {number}") for number in range(10)]
    region.update((), rows)
    written = len(screen.written)
    region.update((), rows)
    assert len(screen.written) == written
    region.update((), [*rows[:-1], row("row X")])
    assert len(screen.written) - written < len(BEGIN + END) + 20
    written = len(screen.written)
    region.update(rows[:4], [*rows[4:-1], row("row X")])
    assert len(screen.written) == written  # rows become final where they stand


def test_each_update_is_shown_as_a_whole() -> None:
    screen = Screen(20)
    region = region_of(screen)
    region.update([row("final")], [row("tail")])
    region.close()
    updates = re.findall(r"\x1b\[\?2026h.*?\x1b\[\?2026l", screen.written, re.DOTALL)
    assert "".join(updates) == screen.written
    assert len(updates) == 2


@pytest.mark.parametrize(("columns", "lines"), [(12, 8), (30, 8), (20, 5), (20, 12), (12, 5)])
def test_a_new_size_leaves_no_old_row(columns: int, lines: int) -> None:
    screen, size = Screen(20, 8), Size(20, 8)
    region = LiveRegion(screen, lambda: size, wraps_again=False)
    region.update([row("final")], [row("an old row"), row("another old row")])
    screen.resize(columns, lines)
    size = Size(columns, lines)
    region.update([row("more")], [row("new")])
    assert screen.rows == ["final", "more", "new"]


def test_rows_that_were_wrapped_again_are_erased() -> None:
    screen, size = Screen(20, 8), Size(20, 8)
    region = LiveRegion(screen, lambda: size)
    region.update((), [row("x" * 18), row("y" * 3), row("z" * 18)])
    size = Size(10, 8)
    written = len(screen.written)
    region.update((), [row("new")])
    assert screen.written[written:].startswith(f"{BEGIN}\x1b[?25l\x1b[3A\x1b[J")  # 2 rows of x, 1 of y


def test_a_tail_that_is_higher_than_the_screen_shows_its_end() -> None:
    screen = Screen(20, 5)
    region = region_of(screen, lines=5)
    region.update((), [row(str(number)) for number in range(10)])
    assert screen.rows == ["6", "7", "8", "9"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm-256color", "XTERM_VERSION": "XTerm(390)"}, False),
        ({"TERM": "linux"}, False),
        ({"TERM": "screen"}, False),
        ({"TERM": "screen", "TMUX": "/run/tmux"}, True),
    ],
)
def test_which_terminals_wrap_again(environment: dict[str, str], expected: bool) -> None:
    assert wraps_again(environment) == expected
