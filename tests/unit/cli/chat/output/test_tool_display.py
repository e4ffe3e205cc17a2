"""Tool calls and results: complete where the user decides, short where not."""

from __future__ import annotations

import pytest

from kimi_mlx.cli.chat.output.tool_display import MAX_ARGUMENT_LINES, format_tool_call, format_tool_result
from kimi_mlx.text.messages import ToolCall, UnparsedToolCall

LONG = "x" * 80


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("{}", "f()"),
        ('{"city": "Paris", "days": 3}', 'f(city: "Paris", days: 3)'),
        ('{"text": "a\\nb", "n": "' + LONG + '"}', f'f\n  text:\n    a\n    b\n  n: "{LONG}"'),
        ('{"text": "' + LONG + '"}', f'f\n  text: "{LONG}"'),
        ("[1, 2]", "f\n  [1, 2]"),
        ("{not json", "f\n  {not json"),
    ],
)
def test_calls(arguments: str, shown: str) -> None:
    assert format_tool_call(ToolCall("1", "f", arguments)) == shown


def test_a_broken_call() -> None:
    assert format_tool_call(UnparsedToolCall("functions.x", "no arguments")) == (
        "broken tool call (no arguments):\n  functions.x"
    )


def test_long_arguments_and_results_are_cut() -> None:
    deep = "[" * 100_000
    assert format_tool_call(ToolCall("1", "f", deep)).endswith("… 99000 more characters")
    many = format_tool_call(ToolCall("1", "f", "\n".join(map(str, range(100)))))
    assert many.endswith(f"… {100 - MAX_ARGUMENT_LINES} more lines")
    assert format_tool_result("\n".join("abcdefghi")) == "a\nb\nc\nd\ne\nf\n… 3 more lines"
    assert format_tool_result("\n".join("abcdefg")) == "a\nb\nc\nd\ne\nf\ng"
    assert format_tool_result("x" * 400) == "x" * 300 + "… 100 more characters"
    assert format_tool_result("\n") == "(no output)"
