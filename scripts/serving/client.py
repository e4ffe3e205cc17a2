"""A request to an OpenAI-compatible chat server, with the time of every event."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

Messages = list[dict[str, str]]
"""Messages in OpenAI's format."""

CHAT_PATH = "/v1/chat/completions"
TIMEOUT_S = 600.0
"""Longest wait for any data."""


@dataclass
class RequestRecord:
    """A request and its result. Times are those of time.perf_counter.

    Args:
        conversation: number of the conversation.
        turn: number of the turn, from 0.
        requested_tokens: `max_tokens`; the answer has this many unless it ends early.
        started_at: start of the request.
        arrivals: arrival time of each chunk of text.
        ended_at: end of the answer.
        text: text of the answer.
        prompt_tokens: number of prompt tokens, as counted by the server.
        cached_tokens: number of these that were cached.
        new_tokens: number of new tokens, as counted by the server.
        error: short description of an error; None if there was none.
    """

    conversation: int
    turn: int
    requested_tokens: int
    started_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    ended_at: float = 0.0
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time from the request to the first text, or to the end of an empty answer."""
        return (self.arrivals[0] if self.arrivals else self.ended_at) - self.started_at

    @property
    def gaps_s(self) -> list[float]:
        """Times between chunks of text."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


def make_client(url: str, api_key: str | None = None, *, receive_bytes: int | None = None) -> httpx2.AsyncClient:
    """Return a client without a connection limit. Creating one is slow, so do it before starting a clock.

    Args:
        url: root URL of the server.
        api_key: API key, if the server has one.
        receive_bytes: size of each connection's receive buffer; None for the system's default.
    """
    options = [] if receive_bytes is None else [(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)]
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=TIMEOUT_S,
        trust_env=False,  # no proxy
        transport=httpx2.AsyncHTTPTransport(limits=limits, socket_options=options, trust_env=False),
    )


def make_body(messages: Messages, tokens: int, *, stream: bool) -> dict[str, Any]:
    """Return the body of a greedy request for at most `tokens` tokens, without thinking."""
    body: dict[str, Any] = {
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0,
        "chat_template_kwargs": {"thinking": False},
    }
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


async def send_request(client: httpx2.AsyncClient, body: dict[str, Any], record: RequestRecord) -> RequestRecord:
    """Send a request and fill in its record; any error becomes a text in the record."""
    record.started_at = time.perf_counter()
    try:
        async with client.stream("POST", CHAT_PATH, json=body) as response:
            if response.status_code != 200:
                record.error = f"HTTP {response.status_code}"
            elif "stream" in body:
                await _read_stream(response, record)
            else:
                _add(json.loads(await response.aread()), "message", record)
    except httpx2.HTTPError as error:
        record.error = type(error).__name__
    except (ValueError, KeyError, TypeError) as error:
        record.error = f"invalid answer ({type(error).__name__})"
    record.ended_at = time.perf_counter()
    return record


async def _read_stream(response: httpx2.Response, record: RequestRecord) -> None:
    async for data in events(response):
        if data == "[DONE]":
            return
        _add(json.loads(data), "delta", record)
    record.error = record.error or "stream without an end"


async def events(response: httpx2.Response) -> AsyncIterator[str]:
    """Yield the data of server-sent events, without comments."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line[6:]


def _add(chunk: dict[str, Any], key: str, record: RequestRecord) -> None:
    """Add a chunk of a stream, or a complete answer."""
    if "error" in chunk:
        record.error = "error in the stream"
    for choice in chunk.get("choices") or ():
        message = choice[key]
        text = message.get("content") or message.get("reasoning_content") or message.get("reasoning")
        if text:
            record.arrivals.append(time.perf_counter())
            record.text += text
    if usage := chunk.get("usage"):
        record.prompt_tokens, record.new_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
