"""The access log: bodies of requests."""

from __future__ import annotations

import json

import pytest

from kimi_mlx.server.http.access_log import text_without_media

BASE64 = "QUJD" * 100


def test_a_body_is_logged_on_one_line_without_control_characters() -> None:
    body = b'{\n\t"a": "\x1b]0;title\x07\n2026-11-29 12:00:00 POST", "b": "\xc2\x9b2J", "c": "\xff\x9b"}\r\n\x00'
    text = text_without_media(body)
    assert text.isprintable()
    assert text == '{ "a": " ]0;title 2026-11-29 12:00:00 POST", "b": " 2J", "c": "\ufffd\ufffd"} '


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32-le"])
def test_the_data_of_images_is_not_logged(encoding: str) -> None:
    body = json.dumps(
        {"url": f"data:image/png;base64,{BASE64}", "data": BASE64, "text": "K\u00f6ln"}, ensure_ascii=False
    )
    text = text_without_media(body.encode(encoding))
    assert BASE64[:8] not in text
    assert "data:image/png;base64,(400 bytes)" in text
    assert "K\u00f6ln" in text
