"""Events of an answer from the chunks of a streamed chat completion."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from kimi_mlx.client.http import RETRY_HINT
from kimi_mlx.client.server_json import parse_server_json
from kimi_mlx.engine.events import Encoded, Finished, Interrupted, Prefilled, Resumed, Statistics
from kimi_mlx.errors import ServerError
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.session.chat_model import ChatEvent
from kimi_mlx.text.messages import Delta, ToolCallDelta
from kimi_mlx.text.tool_calls import read_tool_call

DONE = "[DONE]"

REASONING_FIELDS = ("reasoning_content", "reasoning")
"""Names of the reasoning in a delta: Moonshot's (also in llama.cpp and SGLang), and that of vLLM and OpenRouter."""


@dataclass
class _OpenCall:
    index: int
    id: str
    name: str
    arguments: str = ""


@dataclass(frozen=True)
class _Usage:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class AnswerStream:
    """Reads the chunks of one answer. Chunks may be ours, llama.cpp's, or those of any other compatible server.

    Args:
        url: address of the server, for error messages.
    """

    def __init__(self, url: str):
        self._url = url
        self._call: _OpenCall | None = None
        self._reason: str | None = None
        self._is_done = False
        self._usage = _Usage()
        self._timings: Statistics | None = None
        self._started_at = time.perf_counter()
        self._first_at: float | None = None
        self._num_deltas = 0

    def add(self, data: str) -> Iterator[ChatEvent]:
        """Yield the events of a chunk.

        Args:
            data: data of a server-sent event: JSON, or the mark of the end.

        Raises:
            ServerError: the chunk is an error of the server, or none that can be understood.
        """
        if data == DONE:
            self._is_done = True
            return
        try:
            yield from self._read(parse_server_json(data))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            message = f"{self._url} sent a chunk that cannot be understood: {data!r:.100}"
            raise ServerError(message, hint="check that the address is that of an OpenAI-compatible API") from error

    def finish(self) -> Iterator[ChatEvent]:
        """Yield the last events, after the last chunk.

        Raises:
            ServerError: the stream has ended before the answer.
        """
        if not self._is_done and self._reason is None:
            raise ServerError(f"{self._url} closed the connection before the answer ended", hint=RETRY_HINT)
        yield from self._close_call()
        yield Finished("length" if self._reason == "length" else "stop", self.statistics())

    def cancelled(self) -> Finished:
        """Return the last event of an answer that was cancelled."""
        return Finished("cancelled", self.statistics())

    def statistics(self) -> Statistics:
        """Return the server's statistics, or what can be measured here."""
        if self._timings is not None:
            return self._timings
        now = time.perf_counter()
        first_at = now if self._first_at is None else self._first_at
        return Statistics(
            prompt_tokens=self._usage.prompt_tokens,
            cached_tokens=self._usage.cached_tokens,
            generated_tokens=self._usage.completion_tokens or self._num_deltas,
            ttft_s=first_at - self._started_at,
            decode_s=now - first_at,
            peak_memory_bytes=0,
        )

    def _read(self, chunk: dict[str, Any]) -> Iterator[ChatEvent]:
        if chunk.get("error"):
            raise self._error(chunk["error"])
        if usage := chunk.get("usage"):
            self._usage = _read_usage(usage)
        if timings := chunk.get("timings"):
            self._timings = _read_timings(timings)
        if event := _progress(chunk):
            yield event
        for choice in chunk.get("choices") or ():
            if choice.get("index") or 0:
                continue  # one answer was requested
            yield from self._read_delta(choice.get("delta") or {})
            self._reason = choice.get("finish_reason") or self._reason

    def _read_delta(self, delta: dict[str, Any]) -> Iterator[Delta]:
        reasoning = next((text for name in REASONING_FIELDS if (text := delta.get(name))), "")
        new = Delta(str(delta.get("content") or ""), str(reasoning))
        for part in delta.get("tool_calls") or ():
            new = new + self._read_call(part)
        if new:
            self._num_deltas += 1
            self._first_at = self._first_at or time.perf_counter()
            yield new

    def _read_call(self, part: dict[str, Any]) -> Delta:
        """Return the delta of a part of a tool call; it also ends the call before."""
        function: dict[str, Any] = part.get("function") or {}
        last_index = self._call.index if self._call is not None else -1
        index = int(last_index if (given := part.get("index")) is None else given)
        ended = Delta()
        if self._call is None or index != self._call.index:
            ended = Delta(tool_calls=tuple(call for delta in self._close_call() for call in delta.tool_calls))
            name = str(function.get("name") or "")
            self._call = _OpenCall(max(index, 0), str(part.get("id") or f"functions.{name}:{max(index, 0)}"), name)
            new = ToolCallDelta(self._call.index, self._call.id, name)
        else:
            new = ToolCallDelta(index)
        arguments: Any = function.get("arguments") or ""
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self._call.arguments += text
        return ended + Delta(tool_call_deltas=(replace(new, arguments=text),))

    def _close_call(self) -> Iterator[Delta]:
        """Yield the complete call that is open, if there is one."""
        if self._call is not None:
            call, self._call = self._call, None
            yield Delta(tool_calls=(read_tool_call(call.id, call.name, call.arguments, call.index),))

    def _error(self, error: Any) -> ServerError:
        fields = cast("dict[str, Any]", error) if isinstance(error, dict) else {"message": error}
        hint = RETRY_HINT
        if fields.get("code") == "stopping":
            hint = f"start it again, then {RETRY_HINT}"
        return ServerError(f"{self._url}: {fields.get('message') or 'an error without a message':.1000}", hint=hint)


def _progress(chunk: Mapping[str, Any]) -> ChatEvent | None:
    """Return the event of a chunk that reports progress; None for all others."""
    if progress := chunk.get("prompt_progress"):
        return Prefilled(int(progress["processed"]), int(progress["total"]))
    if image := chunk.get("image_progress"):
        return Encoded(*(int(image[name]) for name in ("image", "num_images", "done", "total")))
    if notice := chunk.get("notice"):
        if notice["type"] == "interrupted":
            wait_s = float(notice["wait_s"])
            return Interrupted(str(notice["reason"]), int(notice["attempt"]), int(notice["attempts"]), wait_s)
        if notice["type"] == "resumed":
            return Resumed(float(notice["seconds"]))
    return None


def _read_usage(usage: Mapping[str, Any]) -> _Usage:
    details: Any = usage.get("prompt_tokens_details") or {}
    return _Usage(
        _read_count(usage, "prompt_tokens"),
        _read_count(details, "cached_tokens"),
        _read_count(usage, "completion_tokens"),
    )


def _read_count(values: Mapping[str, Any], name: str) -> int:
    return max(0, int(values.get(name) or 0))


def _read_timings(timings: Mapping[str, Any]) -> Statistics:
    """Return the statistics of `timings`, which are ours or llama.cpp's."""
    cached = _read_count(timings, "cache_n")
    prompt_s, decode_s, encode_s = (
        max(0.0, float(timings.get(name) or 0)) / 1e3 for name in ("prompt_ms", "predicted_ms", "encode_ms")
    )
    return Statistics(
        prompt_tokens=_read_count(timings, "prompt_n") + cached,
        cached_tokens=cached,
        generated_tokens=_read_count(timings, "predicted_n"),
        ttft_s=prompt_s,
        decode_s=decode_s,
        peak_memory_bytes=_read_count(timings, "peak_memory_bytes"),
        decode_steps=_read_count(timings, "decode_steps"),
        encode_s=encode_s,
        drafted_tokens=_read_count(timings, "draft_n"),
        accepted_tokens=_read_count(timings, "draft_n_accepted"),
        drafts_off=str(drafts_off) if (drafts_off := timings.get("drafts_off")) else None,
        prompt_read_bytes=_read_count(timings, "prompt_read_bytes"),
        experts=_read_experts(timings.get("experts")),
    )


def _read_experts(counters: Any) -> ExpertStats | None:
    if not isinstance(counters, dict):
        return None
    values = cast("dict[str, Any]", counters)
    known = [item.name for item in fields(ExpertStats)]
    return ExpertStats(**{name: max(0, values[name]) for name in known if isinstance(values.get(name), (int, float))})
