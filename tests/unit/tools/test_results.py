"""Results that fit the context."""

from __future__ import annotations

from kimi_mlx.tools.results import ToolResult, parse_arguments, shorten


def test_a_short_text_stays() -> None:
    assert shorten("abc", 10, len) == "abc"


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    text = "BEGIN" + "x" * 1_000_000 + "END"
    short = shorten(text, 1_000, len)
    assert len(short) <= 1_000
    assert short.startswith("BEGIN")
    assert short.endswith("END")
    assert "of 1,000,008 characters left out" in short


def test_tokens_are_counted_a_few_times_only() -> None:
    counted: list[int] = []

    def count(text: str) -> int:
        counted.append(len(text))
        return len(text) // 3

    assert count(shorten("word " * 10_000_000, 2_000, count)) <= 2_000
    assert len(counted) < 9
    assert max(counted) < 50_000


def test_a_budget_smaller_than_the_note_leaves_the_note() -> None:
    assert "left out" in shorten("x" * 10_000, 1, len)


def test_errors_are_marked_for_the_model() -> None:
    assert ToolResult("no", is_error=True).content == "Error: no"
    assert ToolResult("yes").content == "yes"


def test_arguments() -> None:
    assert parse_arguments("") == {}
    assert parse_arguments('{"a": 1}') == {"a": 1}
