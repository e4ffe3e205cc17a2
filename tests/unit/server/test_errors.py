"""Errors of requests: status and code by kind, and hints that stay on the server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kimi_mlx.server
from kimi_mlx.errors import EngineError, KimiMlxError, LinkError, RingError, StepError, TextError, UsageError
from kimi_mlx.server.errors import MAX_MESSAGE_CHARS, ApiError, api_error

HINT = "start a new conversation with /reset, or set --cache-memory"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineError("no", HINT), 400, "invalid_value"),
        (TextError("no", HINT), 400, "invalid_value"),
        (UsageError("no", HINT), 400, "invalid_value"),
        (StepError("no", HINT), 500, "step_failed"),
        (RingError("no", HINT), 503, "ring_lost"),
        (LinkError("no", HINT), 503, "unavailable"),
    ],
)
def test_hints_for_the_operator_go_to_the_log_only(error: KimiMlxError, status: int, code: str) -> None:
    response = api_error(error)
    assert (response.status, response.code) == (status, code)
    assert response.message.split(";")[0] == "no"
    assert HINT not in response.message
    assert HINT in response.log_text


def test_no_message_of_the_server_names_an_option() -> None:
    """Clients cannot set options of `serve`; hints may name them."""
    for path in Path(kimi_mlx.server.__file__).parent.rglob("*.py"):
        for message in re.findall(r"^\s*(?:message = |raise ApiError\(|return ApiError\().*", path.read_text(), re.M):
            assert not re.search(r"[` ]--[a-z]", message.split("hint=")[0]), (path, message)


def test_an_unknown_error_reveals_nothing() -> None:
    assert api_error(ValueError("a secret")).message == "internal server error; see the server's log"


def test_long_messages_are_cut() -> None:
    assert len(ApiError(400, "x" * 100_000).message) == MAX_MESSAGE_CHARS + 3
