"""One request to a server of OpenAI's chat completions, with the time of everything that comes back."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

Messages = list[dict[str, str]]
"""Messages as OpenAI has them."""

CHAT_PATH = "/v1/chat/completions"
TIMEOUT_S = 600.0
"""For anything to come."""


@dataclass
class RequestRecord:
    """A request and what came of it; times by time.perf_counter.

    Args:
        conversation: its number.
        turn: in it, from 0.
        requested_tokens: that the answer may have; it has as many unless it ends by itself.
        started_at: the request is about to be sent.
        arrivals: when each piece of text came.
        ended_at: the answer's end came.
        text: of the answer.
        prompt_tokens: by the server's own count.
        cached_tokens: of these, those it had computed before.
        new_tokens: by the server's own count.
        error: what went wrong, in a few words; None if nothing did.
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
        """From the request until the first text; until the end of an answer without any."""
        return (self.arrivals[0] if self.arrivals else self.ended_at) - self.started_at

    @property
    def gaps_s(self) -> list[float]:
        """Between one piece of text and the next."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


def make_client(url: str, api_key: str | None = None, *, receive_bytes: int | None = None) -> httpx2.AsyncClient:
    """A client with as many connections as are needed; making one takes long, so it is made before a clock starts.

    Args:
        url: of the server's root.
        api_key: if it wants one.
        receive_bytes: of each connection's buffer; None: the system's choice.
    """
    options = [] if receive_bytes is None else [(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)]
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=TIMEOUT_S,
        trust_env=False,  # no proxy in between
        transport=httpx2.AsyncHTTPTransport(limits=limits, socket_options=options, trust_env=False),
    )


def make_body(messages: Messages, tokens: int, *, stream: bool) -> dict[str, Any]:
    """A greedy answer of at most so many tokens, without thinking."""
    body: dict[str, Any] = {
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0,
        "chat_template_kwargs": {"thinking": False},
    }
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


async def send_request(client: httpx2.AsyncClient, body: dict[str, Any], record: RequestRecord) -> RequestRecord:
    """Fill in an record; errors of any kind become words in it."""
    record.started_at = time.perf_counter()
    try:
        async with client.stream("POST", CHAT_PATH, json=body) as response:
            if response.status_code != 200:
                record.error = f"HTTP {response.status_code}"
            elif "stream" in body:
                await _read_stream(response, record)
            else:
                _take(json.loads(await response.aread()), "message", record)
    except httpx2.HTTPError as error:
        record.error = type(error).__name__
    except (ValueError, KeyError, TypeError) as error:
        record.error = f"an answer that is none ({type(error).__name__})"
    record.ended_at = time.perf_counter()
    return record


async def _read_stream(response: httpx2.Response, record: RequestRecord) -> None:
    async for data in events(response):
        if data == "[DONE]":
            return
        _take(json.loads(data), "delta", record)
    record.error = record.error or "a stream without an end"


async def events(response: httpx2.Response) -> AsyncIterator[str]:
    """The data of server-sent events; comments are passed over."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line[6:]


def _take(chunk: dict[str, Any], where: str, record: RequestRecord) -> None:
    """Add a chunk of a stream, or a whole answer."""
    if "error" in chunk:
        record.error = "an error in the stream"
    for choice in chunk.get("choices") or ():
        said = choice[where]
        text = said.get("content") or said.get("reasoning_content") or said.get("reasoning")
        if text:
            record.arrivals.append(time.perf_counter())
            record.text += text
    if usage := chunk.get("usage"):
        record.prompt_tokens, record.new_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
