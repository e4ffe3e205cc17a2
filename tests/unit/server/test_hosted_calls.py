"""Hosted calls in older messages become text."""

from __future__ import annotations

import pytest

from kimi_mlx.server.hosted_calls import hosted_text, is_hosted, read_hosted_parts


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        *((name, True) for name in ("server_tool_use", "web_search_tool_result", "web_search_call", "compaction")),
        *((name, True) for name in ("local_shell_call", "custom_tool_call", "custom_tool_call_output", "mcp_tool_use")),
        *((name, False) for name in ("tool_use", "tool_result", "function_call", "function_call_output", "text", None)),
    ],
)
def test_types(content_type: object, expected: bool) -> None:
    assert is_hosted(content_type) is expected


def test_a_hosted_call_becomes_text_without_bookkeeping() -> None:
    found = {"type": "web_search_result", "url": "https://example.org", "title": "Rain", "encrypted_content": "x" * 999}
    result = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": [found], "cache_control": {}}
    text = '[web_search_tool_result: [{"url": "https://example.org", "title": "Rain"}]]'
    assert hosted_text(result) == text
    use = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "Zürich"}}
    assert hosted_text(use) == '[server_tool_use: {"name": "web_search", "input": {"query": "Zürich"}}]'
    assert hosted_text({"type": "compaction", "content": "They greeted."}) == "[compaction: They greeted.]"
    other = {"type": "text", "text": "Hi"}
    assert read_hosted_parts([other, result]) == [other, {"type": "text", "text": text}]


def test_content_without_hosted_calls_is_unchanged() -> None:
    for content in ("text", None, [], [{"type": "text", "text": "Hi"}, 5, {"type": ["odd"]}]):
        assert read_hosted_parts(content) is content


def test_deep_values_are_cut() -> None:
    value: object = "end"
    for _ in range(5000):
        value = [value]
    assert hosted_text({"type": "mcp_call", "output": value, "name": "f"}).startswith("[mcp_call: {")
