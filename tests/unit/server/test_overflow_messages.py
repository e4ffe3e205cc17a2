"""Error messages for a prompt that is too long, by whose wording clients recognise it, in every API."""

from __future__ import annotations

import pickle
import re

import pytest

from kimi_mlx.server.anthropic.response import anthropic_error
from kimi_mlx.server.errors import PromptTooLongError
from kimi_mlx.server.openai.response_fields import openai_error

CLIENTS = {
    # packages/kosong/src/errors.ts of kimi-code; kimi-cli's kimisoul.py is like it
    "kimi-code": r"context[ _-]?length|maximum context|prompt is too long.*maximum",
    # utils/overflow.js of pi-ai
    "pi": r"prompt is too long|reduce the length of the messages|maximum context length is \d+ tokens",
    # exception_mapping_utils.py of litellm
    "litellm": r"exceed context limit|this model's maximum context length is|is longer than the model's context length",
    # the number of tokens by which a prompt is too long, in Claude Code
    "claude-code": r"prompt is too long[^0-9]*(\d+)\s*tokens?\s*>\s*(\d+)",
}
OPENAI_CLIENTS, ANTHROPIC_CLIENTS = ("kimi-code", "pi", "litellm"), ("kimi-code", "pi", "claude-code")


@pytest.mark.parametrize("is_exact", [True, False])
def test_clients_recognise_the_message(is_exact: bool) -> None:
    error = PromptTooLongError(2500, 2000, "messages", is_exact)
    openai, anthropic = openai_error(error)["error"], anthropic_error(error)["error"]
    for client in OPENAI_CLIENTS:
        assert re.search(CLIENTS[client], openai["message"], re.IGNORECASE), client
    for client in ANTHROPIC_CLIENTS:
        assert re.search(CLIENTS[client], anthropic["message"], re.IGNORECASE), client
    assert (openai["code"], openai["type"]) == ("context_length_exceeded", "invalid_request_error")
    assert anthropic == {"type": "invalid_request_error", "message": "prompt is too long: 2500 tokens > 2000 maximum"}


def test_the_error_crosses_processes() -> None:
    error = PromptTooLongError(2500, 2000, "prompt[1]", False)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.message, copy.param, copy.anthropic_message) == (error.message, "prompt[1]", error.anthropic_message)
