"""Chat completions with the `openai` package."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.server.running_server import RunningServer

HI: Any = [{"role": "user", "content": "hi"}]
HELLO = "Hello! I am kimi-mini, a toy model in the shape of Kimi K2. How can I help?"
PELICAN: Any = [{"role": "user", "content": "Generate an SVG of a pelican riding a bicycle"}]
WEATHER: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The city"}},
                "required": ["city"],
            },
        },
    }
]
PARIS: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


def complete(client: openai.OpenAI, messages: Any = HI, **options: Any) -> Any:
    return client.chat.completions.create(model="kimi-mini", messages=messages, **options)


def assemble(chunks: Any) -> dict[str, Any]:
    """Assemble a message from the chunks of a stream."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": {}}
    for chunk in chunks:
        for choice in chunk.choices:
            message["content"] += choice.delta.content or ""
            message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
            for part in choice.delta.tool_calls or ():
                call = message["calls"].setdefault(part.index, {"id": part.id, "name": part.function.name, "text": ""})
                call["text"] += part.function.arguments
            message["finish_reason"] = choice.finish_reason
        message["usage"] = chunk.usage
    return message


def test_an_answer_has_reasoning_text_and_usage(client: openai.OpenAI) -> None:
    answer = complete(client)
    (choice,) = answer.choices
    assert choice.message.content == HELLO
    assert choice.message.reasoning_content == "A greeting."
    assert choice.finish_reason == "stop"
    assert answer.model == "kimi-mini"
    assert answer.usage.prompt_tokens == 9
    assert answer.usage.total_tokens == 9 + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens
    again = complete(client)
    assert again.usage.prompt_tokens_details.cached_tokens == 8


def test_a_stream_adds_up_to_the_same_answer(client: openai.OpenAI) -> None:
    whole = complete(client)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    streamed = assemble(chunks)
    assert (streamed["content"], streamed["reasoning_content"]) == (HELLO, "A greeting.")
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert assemble(complete(client, stream=True))["usage"] is None


@pytest.mark.slow
def test_concurrent_answers_equal_single_ones(running: RunningServer) -> None:
    questions = ["hi", "What is 3 + 4?", "Say pelican", "hi"]

    async def complete_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="any") as client:

            async def one(text: str) -> str:
                stream: Any = await client.chat.completions.create(
                    model="default", messages=[{"role": "user", "content": text}], stream=True, max_tokens=60
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            alone = [await one(text) for text in questions]
            together = await asyncio.gather(*map(one, questions))
            assert together == alone
            return alone

    answers = asyncio.run(complete_all())
    assert answers[0] == answers[3] == HELLO


def test_tool_calls_and_results(client: openai.OpenAI) -> None:
    whole = complete(client, PARIS, tools=WEATHER)
    (call,) = whole.choices[0].message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.content is None
    assert (call.id, call.function.name) == ("functions.get_weather:0", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}

    chunks = list(complete(client, PARIS, tools=WEATHER, stream=True))
    streamed = assemble(chunks)
    assert streamed["calls"] == {0: {"id": call.id, "name": "get_weather", "text": call.function.arguments}}
    assert streamed["finish_reason"] == "tool_calls"
    assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks) > 3

    assistant = whole.choices[0].message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "sky": "clear"}'}
    answer = complete(client, [*PARIS, assistant, result], tools=WEATHER)
    assert "21" in answer.choices[0].message.content

    for message in (assistant, result):
        message.pop("reasoning_content", None)
    assistant["tool_calls"][0]["id"] = result["tool_call_id"] = "call_abc"
    assert "21" in complete(client, [*PARIS, assistant, result], tools=WEATHER).choices[0].message.content
    again = complete(client, [*PARIS, assistant, result, *PARIS], tools=WEATHER).choices[0].message
    assert all(call.id.startswith("call_") for call in again.tool_calls or ())


def test_tool_choice_none(client: openai.OpenAI) -> None:
    assert (
        complete(client, PARIS, tools=WEATHER, tool_choice="none", max_tokens=40).choices[0].message.tool_calls is None
    )


SCHEMA: Any = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 10, "maximum": 99}, "kind": {"enum": ["sum", "other"]}},
    "required": ["sum", "kind"],
    "additionalProperties": False,
}


@pytest.mark.slow
def test_response_schemas(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA, "strict": True}}
    for options in ({}, {"stream": True}, {"temperature": 1.5, "seed": 1}):
        answer = complete(client, response_format=form, **options)
        text = assemble(answer)["content"] if "stream" in options else answer.choices[0].message.content
        value = json.loads(text)
        assert value.keys() == {"sum", "kind"}
        assert 10 <= value["sum"] <= 99
        assert value["kind"] in ("sum", "other")
    answer = complete(client, response_format={"type": "json_object"}, max_tokens=200).choices[0]
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)


def test_required_tool_calls(client: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        (call,) = (
            complete(client, HI, tools=WEATHER, tool_choice=choice, parallel_tool_calls=False)
            .choices[0]
            .message.tool_calls
        )
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments).keys() == {"city"}


@pytest.mark.slow
def test_thinking_can_be_turned_off(client: openai.OpenAI) -> None:
    for switch in (
        {"thinking": {"type": "disabled"}},
        {"chat_template_kwargs": {"thinking": False}},
        {"reasoning_effort": "none"},
    ):
        message = complete(client, extra_body=switch).choices[0].message
        assert message.content
        assert not hasattr(message, "reasoning_content")


def test_earlier_reasoning_is_kept_on_request(client: openai.OpenAI) -> None:
    past = [*HI, {"role": "assistant", "content": HELLO, "reasoning_content": "A greeting. " * 20}, *HI]
    dropped = complete(client, past, max_tokens=1).usage.prompt_tokens
    kept = complete(client, past, max_tokens=1, extra_body={"chat_template_kwargs": {"preserve_thinking": True}}).usage
    assert kept.prompt_tokens > dropped + 20


def test_a_partial_answer_is_continued(client: openai.OpenAI) -> None:
    partial = {"role": "assistant", "content": "Hello! I am", "partial": True}
    answer = complete(client, [*HI, partial])
    assert answer.choices[0].message.content == HELLO.removeprefix("Hello! I am")
    with_reasoning = complete(client, [*HI, {**partial, "reasoning_content": "A greeting. " * 20}], max_tokens=1)
    assert with_reasoning.usage.prompt_tokens > answer.usage.prompt_tokens + 20


@pytest.mark.slow
def test_several_answers_differ_and_are_reproducible(client: openai.OpenAI) -> None:
    first, again = (complete(client, n=4, temperature=2, seed=3, max_tokens=12) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    assert first.usage.prompt_tokens == 9
    assert first.usage.completion_tokens <= 48
    chunks = list(complete(client, n=4, temperature=2, seed=3, max_tokens=12, stream=True))
    streamed = ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == i) for i in range(4)]
    assert streamed == texts


@pytest.mark.parametrize("is_stream", [False, True])
def test_stop_texts(client: openai.OpenAI, is_stream: bool) -> None:
    answer = complete(client, stop=["oy mod", "nowhere"], stream=is_stream)
    message = assemble(answer) if is_stream else answer.choices[0].message.model_dump()
    assert message["content"] == HELLO.partition("oy mod")[0]
    assert (message if is_stream else answer.choices[0].to_dict())["finish_reason"] == "stop"


def test_max_tokens(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = complete(client, **{name: 8})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (8, "length")


@pytest.mark.slow
def test_logprobs(client: openai.OpenAI) -> None:
    tokens = complete(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == HELLO
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == HELLO
    for token in tokens:
        assert token.top_logprobs[0].logprob == token.logprob <= 0
        assert len(token.top_logprobs) == 3
    streamed = [
        token.token
        for chunk in complete(client, logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == [token.token for token in tokens]
    cut = complete(client, logprobs=True, stop="toy m").choices[0]
    assert "".join(token.token for token in cut.logprobs.content).startswith(cut.message.content)
    assert len(cut.logprobs.content) < len(tokens)


def test_logit_bias(client: openai.OpenAI) -> None:
    (biased,) = client.completions.create(model="default", prompt="a", logit_bias={"300": 100}, max_tokens=3).choices
    assert biased.text
    assert biased.text == biased.text[: len(biased.text) // 3] * 3


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": -1}, "top_p"),
    ({"n": 0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logit_bias": {"99999": 1}}, "logit_bias.99999"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "nobody", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "contents": "hi"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].tool_call_id"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}},
        "response_format.json_schema.schema.type",
    ),
    ({"extra_body": {"chat_template_kwargs": {"messages": 1}}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("options", "param"), INVALID, ids=[str(param) for _, param in INVALID])
def test_invalid_fields_are_named(client: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "kimi-mini", "messages": HI, **options})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_longer_than_the_context_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, [{"role": "user", "content": "word " * 70_000}])
    assert caught.value.code == "context_length_exceeded"


def test_models(client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    assert listed.id == "kimi-mini"
    for name in ("kimi-mini", "mini", "default"):
        assert client.models.retrieve(name).model_dump()["context_length"] == 65536
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=HI)
    assert caught.value.code == "model_not_found"
