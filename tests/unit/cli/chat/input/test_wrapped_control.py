"""Rows of the edited text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cli.chat.input.wrapped_control import num_columns, row_starts
from tests.examples import examples


@pytest.mark.parametrize(
    ("line", "rows"),
    [
        ("", [""]),
        ("short", ["short"]),
        ("two words of text", ["two words ", "of text"]),
        ("x" * 25, ["x" * 10, "x" * 10, "x" * 5]),
        ("漢字漢字漢字", ["漢字漢字漢", "字"]),
        ("a long-word-that-is-cut", ["a ", "long-word-", "that-is-cu", "t"]),
    ],
)
def test_rows(line: str, rows: list[str]) -> None:
    starts = row_starts(line, 10)
    assert [line[start:end] for start, end in zip(starts, [*starts[1:], len(line)], strict=True)] == rows


@examples(200)
@given(st.text(alphabet="ab 漢\x1b\u0301🙂", max_size=60), st.integers(2, 12))
def test_rows_fit_and_cover_the_line(line: str, width: int) -> None:
    starts = row_starts(line, width)
    rows = [line[start:end] for start, end in zip(starts, [*starts[1:], len(line)], strict=True)]
    assert "".join(rows) == line
    assert all(sum(num_columns(character) for character in row) <= width for row in rows)
    assert all(rows) or line == ""
