"""The Messages API with the `anthropic` package, against a real server with kimi-mini."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx2
import pytest
from anthropic.types import Message, MessageParam, TextBlock, ThinkingBlock, ToolParam, ToolUseBlock
from pydantic import BaseModel

from kimi_mlx.server.http.security import Security
from kimi_mlx.server.server import ServingOptions
from kimi_mlx.session.session import Session
from tests.server.running_server import serving

KEY = "key-of-the-test"
GREEDY = {"temperature": 0}  # the package no longer has an argument for it
SUM: list[MessageParam] = [{"role": "user", "content": "What is 12 + 34?"}]
WEATHER: ToolParam = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city"}},
        "required": ["city"],
    },
}
IN_PARIS: list[MessageParam] = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    with serving(session, ServingOptions(Security(keys=(KEY,)))) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if isinstance(block, TextBlock))


@pytest.mark.slow
def test_thinking_is_off_unless_requested(client: anthropic.Anthropic):
    instant = client.messages.create(model="claude-sonnet-9", max_tokens=200, messages=SUM, extra_body=GREEDY)
    assert instant.model == "kimi-mini"
    assert [block.type for block in instant.content] == ["text"]
    assert "46" in text_of(instant)
    thinking_message = client.messages.create(
        model="kimi-mini",
        max_tokens=2000,
        messages=SUM,
        extra_body=GREEDY,
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    thinking, text = thinking_message.content
    assert isinstance(thinking, ThinkingBlock)
    assert isinstance(text, TextBlock)
    assert thinking.thinking
    assert thinking.signature
    assert "46" in text.text
    assert thinking_message.stop_reason == "end_turn"
    assert thinking_message.usage.output_tokens_details is not None
    assert 0 < thinking_message.usage.output_tokens_details.thinking_tokens < thinking_message.usage.output_tokens


def test_a_stream_adds_up_to_the_same_message(client: anthropic.Anthropic):
    params: Any = {"model": "kimi-mini", "max_tokens": 300, "messages": IN_PARIS, "tools": [WEATHER]}
    params |= {"extra_body": GREEDY, "thinking": {"type": "adaptive"}}
    whole = client.messages.create(**params)
    with client.messages.stream(**params) as stream:
        event_types = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert event_types[0] == "message_start"
    assert event_types[-1] == "message_stop"
    assert {"thinking", "input_json", "signature"} <= set(event_types)
    assert [without_id(block) for block in streamed.content] == [without_id(block) for block in whole.content]
    assert (streamed.stop_reason, whole.stop_reason) == ("tool_use", "tool_use")
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    total = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert streamed.usage.input_tokens + (streamed.usage.cache_read_input_tokens or 0) == total
    assert streamed.usage.cache_read_input_tokens


def without_id(block: Any) -> dict[str, Any]:
    return {**block.model_dump(), "id": None}


def test_tool_calls_and_results(client: anthropic.Anthropic):
    params: Any = {"model": "kimi-mini", "max_tokens": 300, "tools": [WEATHER], "extra_body": GREEDY}
    call: Message = client.messages.create(messages=IN_PARIS, **params)
    used = call.content[-1]
    assert isinstance(used, ToolUseBlock)
    assert used.id.startswith("toolu_")
    assert (used.name, used.input) == ("get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": used.id, "content": '{"temperature": 17, "sky": "rain"}'}
    messages: Any = [*IN_PARIS, call.to_param(), {"role": "user", "content": [result]}]
    answer: Message = client.messages.create(messages=messages, **params)
    assert answer.stop_reason == "end_turn"
    assert "17" in text_of(answer)
    with pytest.raises(anthropic.BadRequestError, match="does not appear before its result"):
        client.messages.create(model="kimi-mini", max_tokens=9, messages=[messages[0], messages[2]])


def test_stop_reasons(client: anthropic.Anthropic):
    short = client.messages.create(model="kimi-mini", max_tokens=3, messages=SUM, extra_body=GREEDY)
    assert short.stop_reason == "max_tokens"
    assert short.usage.output_tokens == 3
    stopped = client.messages.create(
        model="kimi-mini", max_tokens=200, messages=SUM, extra_body=GREEDY, stop_sequences=["never", "46"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "46")
    assert "46" not in text_of(stopped)


def test_a_partial_answer_is_continued(client: anthropic.Anthropic):
    whole = text_of(client.messages.create(model="kimi-mini", max_tokens=200, messages=SUM, extra_body=GREEDY))
    messages: list[MessageParam] = [*SUM, {"role": "assistant", "content": whole[:4]}]
    rest = client.messages.create(model="kimi-mini", max_tokens=200, messages=messages, extra_body=GREEDY)
    assert not text_of(rest).startswith(whole[:4])


def test_token_counts_match_usage(client: anthropic.Anthropic):
    counted = client.messages.count_tokens(
        model="claude-x",
        messages=IN_PARIS,
        tools=[WEATHER],
        system="Be brief.",
        extra_body={"max_tokens": 1, "temperature": 0.5, "stream": True},  # some clients send the whole request
    )
    message = client.messages.create(
        model="claude-x", max_tokens=1, messages=IN_PARIS, tools=[WEATHER], system="Be brief."
    )
    assert counted.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


class Verdict(BaseModel):
    colour: Literal["red", "green"]
    is_sure: bool


@pytest.mark.slow
def test_schemas_and_required_calls(client: anthropic.Anthropic):
    parsed = client.messages.parse(
        model="kimi-mini", max_tokens=300, messages=SUM, output_format=Verdict, extra_body=GREEDY
    )
    assert isinstance(parsed.parsed_output, Verdict)
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}):
        params: Any = {"model": "kimi-mini", "max_tokens": 300, "tools": [WEATHER], "tool_choice": choice}
        called: Message = client.messages.create(messages=SUM, extra_body=GREEDY, **params)
        (use,) = called.content
        assert isinstance(use, ToolUseBlock)
        assert "city" in use.input
        assert called.stop_reason == "tool_use"
    invalid: Any = {"output_config": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}}
    with pytest.raises(anthropic.BadRequestError, match=r"format\.schema\.type`: `nonsense` is not a type"):
        client.messages.create(model="kimi-mini", max_tokens=9, messages=SUM, extra_body=invalid)


def test_the_model_is_listed(client: anthropic.Anthropic):
    assert [model.id for model in client.models.list()] == ["kimi-mini"]
    assert client.models.retrieve("kimi-mini").id == "kimi-mini"


@pytest.mark.slow
def test_async_client(url: str):
    async def both() -> tuple[Message, str]:
        async with anthropic.AsyncAnthropic(base_url=url, auth_token=KEY, max_retries=0) as client:
            params: Any = {"model": "kimi-mini", "max_tokens": 200, "messages": SUM, "extra_body": GREEDY}
            async with client.messages.stream(**params) as stream:
                streamed = "".join([text async for text in stream.text_stream])
            return await client.messages.create(**params), streamed

    message, streamed = asyncio.run(both())
    assert text_of(message) == streamed


def test_errors_have_anthropics_format(client: anthropic.Anthropic, url: str):
    with (
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as intruder,
        pytest.raises(anthropic.AuthenticationError),
    ):
        intruder.messages.create(model="kimi-mini", max_tokens=1, messages=SUM)
    with pytest.raises(anthropic.NotFoundError, match="is not served here"):
        client.messages.create(model="gpt-9", max_tokens=1, messages=SUM)
    image: Any = {"type": "image", "source": {"type": "url", "url": "https://example.org/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match="this model reads text only") as error:
        client.messages.create(model="kimi-mini", max_tokens=1, messages=[{"role": "user", "content": [image]}])
    body: Any = error.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.role"):
        client.messages.create(model="kimi-mini", max_tokens=1, messages=[{"role": "tool", "content": ""}])  # pyright: ignore[reportArgumentType]
    long = "word " * 70_000
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(model="kimi-mini", max_tokens=1, messages=[{"role": "user", "content": long}])


@pytest.mark.slow
def test_a_request_like_claude_codes(url: str):
    """Claude Code's headers, query, fields, billing header, and server tool for web searches."""
    headers = {
        "authorization": f"Bearer {KEY}",
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    }
    cached = {"type": "ephemeral"}

    def send(number: int, **fields: Any) -> httpx2.Response:
        header = f"x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch={number:05x};"
        long = " ".join(f"Rule {rule}: be brief." for rule in range(20))
        body: dict[str, Any] = {
            "model": "claude-haiku-9-20990101",
            "max_tokens": 32000,
            "system": [{"type": "text", "text": text, "cache_control": cached} for text in (header, long)],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "<system-reminder>\nNothing new.\n</system-reminder>"},
                        {"type": "text", "text": "What is 12 + 34?", "cache_control": cached},
                    ],
                }
            ],
            "tools": [
                {**WEATHER, "name": f"tool_{index}", "cache_control": cached, "eager_input_streaming": True}
                for index in range(5)
            ],
            "metadata": {"user_id": "user_1"},
            "thinking": {"type": "disabled"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "high"},
            "temperature": 0,
            "stream": True,
        }
        return httpx2.post(f"{url}/v1/messages?beta=true", headers=headers, json=body | fields, timeout=60)

    first, second = send(1), send(2)
    assert (first.status_code, second.status_code) == (200, 200)
    events = [json.loads(line.removeprefix("data: ")) for line in second.text.splitlines() if line.startswith("data")]
    (end,) = [event for event in events if event["type"] == "message_delta"]
    assert end["usage"]["cache_read_input_tokens"] > end["usage"]["input_tokens"]
    search = send(3, tools=[{"type": "web_search_20250305", "name": "web_search", "max_uses": 8}])
    assert search.status_code == 200
    assert "left out, because they run at Anthropic: web_search_20250305" in search.text
