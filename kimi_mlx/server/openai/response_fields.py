"""Parts of responses that several of OpenAI's APIs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kimi_mlx.engine.events import Encoded, Interrupted, Prefilled, Resumed, Statistics
from kimi_mlx.server.api_types import NOTES_FIELD, ProgressEvent, Usage
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


def notes_dict(notes: Sequence[str]) -> dict[str, Any]:
    """Return the field of a response with the notes on its request, if there are any."""
    return {NOTES_FIELD: [*notes]} if notes else {}


def progress_dict(event: ProgressEvent) -> dict[str, Any]:
    """Return the field of a chunk that reports progress.

    `prompt_progress` is llama.cpp's. `image_progress` (parts of an image's encoding) and `notice` (the ring was lost,
    or is back) are our own.

    Source: result_prompt_progress::to_json in llama.cpp's tools/server/server-task.cpp.
    """
    match event.progress:
        case Prefilled(done, total):
            time_ms = round(event.time_s * 1e3)
            return {
                "prompt_progress": {"total": total, "cache": event.cached_tokens, "processed": done, "time_ms": time_ms}
            }
        case Encoded():
            return {"image_progress": asdict(event.progress)}
        case Interrupted():
            return {"notice": {"type": "interrupted", **asdict(event.progress)}}
        case Resumed():
            return {"notice": {"type": "resumed", **asdict(event.progress)}}


def timings_dict(statistics: Statistics) -> dict[str, Any]:
    """Return the times of an answer as llama.cpp reports them, in milliseconds, and fields of our own.

    These are `encode_ms`, `drafts_off`, `decode_steps`, `peak_memory_bytes`, and, if experts are read from the disk,
    `prompt_read_bytes` and `experts` (those of the steps after the first new token).

    The first new token counts as part of the prompt's time. `prompt_ms` includes `encode_ms`, the encoding of images.

    Source: result_timings::to_json in llama.cpp's tools/server/server-task.cpp.
    """
    prompt_n = statistics.prompt_tokens - statistics.cached_tokens
    prompt_ms, predicted_ms = statistics.ttft_s * 1e3, statistics.decode_s * 1e3
    experts: dict[str, Any] = {}
    if statistics.experts is not None:
        experts = {
            "prompt_read_bytes": statistics.prompt_read_bytes,
            "experts": {**statistics.experts.to_dict(), "hit_rate": statistics.experts.hit_rate},
        }
    return {
        "cache_n": statistics.cached_tokens,
        "prompt_n": prompt_n,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(prompt_n, 1),
        "prompt_per_second": statistics.prefill_tok_per_s,
        "predicted_n": statistics.generated_tokens,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / max(statistics.generated_tokens - 1, 1),
        "predicted_per_second": statistics.decode_tok_per_s,
        "encode_ms": statistics.encode_s * 1e3,
        "draft_n": statistics.drafted_tokens,
        "draft_n_accepted": statistics.accepted_tokens,
        "drafts_off": statistics.drafts_off,
        "decode_steps": statistics.decode_steps,
        "peak_memory_bytes": statistics.peak_memory_bytes,
        **experts,
    }


def openai_error(error: ApiError) -> dict[str, Any]:
    """Return an error in OpenAI's format."""
    types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    error_type = types.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": error_type, "param": error.param, "code": error.code}}
