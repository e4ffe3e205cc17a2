"""Fields of other servers: refused by name unless they have no effect, and all of them documented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.server.anthropic.messages_body import CountBody, MessagesBody
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import parse
from kimi_mlx.server.openai.chat_request import ChatBody
from kimi_mlx.server.openai.completions import CompletionBody
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.unsupported_fields import NO_CONTENT, UNSUPPORTED_FIELDS, CheckedBody

PAGE = Path(__file__).parents[3] / "docs" / "request-fields.md"
MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: list[tuple[type[CheckedBody], dict[str, Any]]] = [
    (ChatBody, {"messages": MESSAGES}),
    (CompletionBody, {"prompt": "Hi"}),
    (MessagesBody, {"messages": MESSAGES}),
    (ResponsesBody, {"input": "Hi"}),
    (CountBody, {"messages": MESSAGES}),
]


@pytest.mark.parametrize(("model", "base"), BODIES)
def test_fields_that_a_body_does_not_have_are_refused(model: type[CheckedBody], base: dict[str, Any]) -> None:
    for name, neutral in UNSUPPORTED_FIELDS.items():
        if name in model.model_fields:
            continue
        for value in (*NO_CONTENT, *neutral):
            parse(model, json.dumps({**base, name: value}).encode())
        for value in ("x", {"x": 1}, 7):
            with pytest.raises(ApiError, match=f"`{name}` is not supported") as error:
                parse(model, json.dumps({**base, name: value}).encode())
            assert (error.value.code, error.value.param) == ("unsupported_parameter", name)


def test_every_field_is_documented() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert not [name for name in UNSUPPORTED_FIELDS if f"`{name}" not in page and f".{name}`" not in page]
