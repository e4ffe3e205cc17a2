"""Parts of responses that several of OpenAI's APIs share."""

from __future__ import annotations

from typing import Any

from kimi_mlx.server.api_types import Usage
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.sse import StreamEvent

DONE = StreamEvent("[DONE]")

MIN_LOGPROB = -9999.0
"""OpenAI's value for a probability of 0, because JSON has no infinity."""


def usage_dict(usage: Usage) -> dict[str, Any]:
    """Return token counts as OpenAI reports them: reasoning is part of the completion."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def openai_error(error: ApiError) -> dict[str, Any]:
    """Return an error in OpenAI's format."""
    types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    error_type = types.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": error_type, "param": error.param, "code": error.code}}
