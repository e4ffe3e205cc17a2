"""The Responses API with the `openai` package, against a real server with kimi-mini."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import FunctionToolParam, Response, ResponseFunctionToolCall
from pydantic import BaseModel

from tests.server.running_server import RunningServer

SUM = "What is 12 + 34?"
WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city"}},
        "required": ["city"],
    },
    "strict": False,
}
IN_PARIS = "What is the weather in Paris?"


def test_an_answer(client: openai.OpenAI):
    response = client.responses.create(
        model="kimi-mini", input=SUM, temperature=0, instructions="Be brief.", store=True
    )
    assert "46" in response.output_text
    assert (response.status, response.model) == ("completed", "kimi-mini")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    instant = client.responses.create(model="kimi-mini", input=SUM, temperature=0, reasoning={"effort": "none"})
    assert [item.type for item in instant.output] == ["message"]
    short = client.responses.create(model="kimi-mini", input=SUM, temperature=0, max_output_tokens=3)
    assert short.status == "incomplete"
    assert short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("summary", [None, "auto"])
def test_a_stream_adds_up_to_the_same_response(client: openai.OpenAI, summary: Any):
    params: Any = {"model": "kimi-mini", "input": IN_PARIS, "tools": [WEATHER], "temperature": 0}
    params |= {"reasoning": {"effort": "high", "summary": summary}}
    whole = client.responses.create(**params)
    with client.responses.stream(**params) as stream:
        event_types = [event.type for event in stream]
        streamed = stream.get_final_response()
    reasoning_delta = "response.reasoning_summary_text.delta" if summary else "response.reasoning_text.delta"
    assert {reasoning_delta, "response.function_call_arguments.delta", "response.output_item.done"} <= set(event_types)
    assert (event_types[0], event_types[-1]) == ("response.created", "response.completed")
    assert [without_ids(item) for item in streamed.output] == [without_ids(item) for item in whole.output]
    assert streamed.usage is not None
    assert streamed.usage.input_tokens_details.cached_tokens


def without_ids(item: Any) -> dict[str, Any]:
    return {key: value for key, value in item.to_dict().items() if key not in ("id", "parsed_arguments")}


def test_tool_calls_and_results(client: openai.OpenAI):
    params: Any = {"model": "kimi-mini", "tools": [WEATHER], "temperature": 0}
    first = client.responses.create(input=IN_PARIS, **params)
    call = first.output[-1]
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.call_id, call.name, call.arguments) == ("functions.get_weather:0", "get_weather", '{"city": "Paris"}')
    result: Any = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": '{"temperature": 17, "sky": "rain"}',
    }
    history: Any = [{"role": "user", "content": IN_PARIS}, *first.to_dict()["output"], result]
    assert "17" in client.responses.create(input=history, **params).output_text
    with pytest.raises(openai.BadRequestError, match="does not appear before its result"):
        client.responses.create(input=[result], **params)


class Verdict(BaseModel):
    colour: Literal["red", "green"]
    is_sure: bool


@pytest.mark.slow
def test_schemas_and_required_calls(client: openai.OpenAI):
    parsed = client.responses.parse(model="kimi-mini", input=SUM, text_format=Verdict, temperature=0)
    assert isinstance(parsed.output_parsed, Verdict)
    params: Any = {"model": "kimi-mini", "input": SUM, "tools": [WEATHER], "temperature": 0}
    choices: Any = ("required", {"type": "function", "name": "get_weather"})
    for choice in choices:
        called: Response = client.responses.create(tool_choice=choice, parallel_tool_calls=False, **params)
        call = called.output[-1]
        assert isinstance(call, ResponseFunctionToolCall)
        assert "city" in json.loads(call.arguments)
    invalid: Any = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match=r"`text\.format\.schema\.type`: `nonsense` is not a type"):
        client.responses.create(model="kimi-mini", input=SUM, text=invalid)


@pytest.mark.slow
def test_async_client(running: RunningServer):
    async def both() -> tuple[Response, str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
            events = await client.responses.create(model="kimi-mini", input=SUM, temperature=0, stream=True)
            text = [event.delta async for event in events if event.type == "response.output_text.delta"]
            return await client.responses.create(model="kimi-mini", input=SUM, temperature=0), "".join(text)

    response, streamed = asyncio.run(both())
    assert response.output_text == streamed


def test_errors(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.responses.create(model="gpt-9", input=SUM)
    with pytest.raises(openai.BadRequestError, match="send the whole conversation") as error:
        client.responses.create(model="kimi-mini", input=SUM, previous_response_id="resp_1")
    assert error.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError, match="max_output_tokens") as error:
        client.responses.create(model="kimi-mini", input=SUM, max_output_tokens=0)
    assert error.value.code == "invalid_value"
