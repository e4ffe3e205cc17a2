"""JSON from a server: values that the client could not handle are refused."""

from __future__ import annotations

import json

import pytest

from kimi_mlx.client.server_json import parse_server_json


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", "[Infinity]", "1e999", "9" * 5000, "[" * 200_000, "[" * 101 + "]" * 101, '{"a":' * 300]
)
def test_values_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_server_json(text)


def test_all_other_values_can_be_stored_and_sent() -> None:
    text = '{"a": [1, -2.5, null, true], "half": "x\\ud800y", "whole": "\\ud83d\\ude00", "text": "\\\\ud800"}'
    value = {"a": [1, -2.5, None, True], "half": "x\ufffdy", "whole": "\U0001f600", "text": "\\ud800"}
    assert parse_server_json(text) == value
    assert parse_server_json(text.encode("utf-16")) == value
    assert json.loads(json.dumps(value, ensure_ascii=False).encode()) == value
    assert parse_server_json(b'"\xff"') == "\ufffd"
    assert parse_server_json("[" * 100 + "]" * 100)
