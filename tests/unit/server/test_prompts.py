"""Preparation of engine requests: any tool schema, bounds before the work, and errors for the client."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.anthropic.messages_body import MessagesBody
from kimi_mlx.server.anthropic.request import to_chat_request as to_messages_request
from kimi_mlx.server.api_types import ChatRequest, CompletionRequest
from kimi_mlx.server.errors import ApiError, PromptTooLongError
from kimi_mlx.server.http.body import parse
from kimi_mlx.server.openai.chat_request import ChatBody
from kimi_mlx.server.openai.completions import CompletionBody
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.openai.responses_request import to_chat_request as to_responses_request
from kimi_mlx.server.prompts import PromptBuilder
from kimi_mlx.text.messages import Message, ToolCall
from tests.examples import examples
from tests.fakes import KIMI_MINI
from tests.schemas import ANY_OBJECT

HI = (Message("user", "hi"),)


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder(ChatTokenizer.load(KIMI_MINI), 2000, {})


def test_the_reasoning_of_a_partial_answer_comes_before_it(builder: PromptBuilder) -> None:
    tokenizer = builder.tokenizer.tokenizer
    prompts = [
        builder.prepare(ChatRequest(messages=HI, partial=partial, partial_reasoning=reasoning)).request.prompt
        for partial, reasoning in ((None, ""), ("So", ""), ("So", "They greet."))
    ]
    end = [tokenizer.special_tokens["</think>"], *tokenizer.encode("So")]
    assert list(prompts[1]) == [*prompts[0], *end]
    assert list(prompts[2]) == [*prompts[0], *tokenizer.encode("They greet."), *end]


def refusal(builder: PromptBuilder, request: ChatRequest) -> ApiError | None:
    """Return the error of a request; None if it can be served."""
    try:
        builder.prepare(request)
    except ApiError as error:
        return error
    return None


@examples(50)
@given(
    parameters=ANY_OBJECT,
    is_strict=st.booleans(),
    tool_choice=st.sampled_from(["auto", "none", "required", {"name": "f"}]),
)
def test_any_json_in_a_tool_schema_is_served_or_refused(
    builder: PromptBuilder, parameters: dict[str, Any], is_strict: bool, tool_choice: Any
) -> None:
    function = {"name": "f", "parameters": parameters, "strict": is_strict}
    request = ChatRequest(
        messages=HI, tools=({"type": "function", "function": function},), tool_choice=tool_choice, max_tokens=1
    )
    error = refusal(builder, request)
    assert error is None or (error.status == 400 and error.code == "context_length_exceeded")


@pytest.mark.parametrize(
    "request_",
    [
        ChatRequest(messages=(Message("user", "x" * 30_000_000),)),
        ChatRequest(messages=HI * 1_000_000),
        ChatRequest(messages=HI * 700),
        ChatRequest(messages=(Message("assistant", "", None, (ToolCall("c", "f", "{}"),) * 400),)),
        ChatRequest(messages=(Message("assistant", "", None, (ToolCall("c", "f", "[[]," * 5_000_000),)),)),
        ChatRequest(messages=(Message("assistant", "", "thinks " * 4_000_000),)),
        ChatRequest(messages=HI, partial="[[]," * 5_000_000),
        CompletionRequest(prompt="x" * 30_000_000),
        CompletionRequest(prompt=(5,) * 1_000_000),
    ],
    ids=[
        *("long message", "many messages", "messages with markers", "many calls", "long arguments", "long reasoning"),
        *("long partial message", "long prompt", "many ids"),
    ],
)
def test_prompts_that_cannot_fit_are_refused_before_they_are_tokenized(
    builder: PromptBuilder, request_: ChatRequest | CompletionRequest
) -> None:
    started = time.process_time()
    with pytest.raises(ApiError, match=r"resulted in \d+ tokens or more") as error:
        builder.prepare(request_)
    assert error.value.code == "context_length_exceeded"
    assert time.process_time() - started < 2  # tokenizing takes 20 s


def test_long_texts_are_tokenized_only_until_they_do_not_fit(builder: PromptBuilder) -> None:
    words = "nobody waits for long, " * 60_000  # 1.4 MB; by its bytes alone it might fit a context of 40,000
    whole = len(builder.tokenizer.encode(words))
    larger = PromptBuilder(builder.tokenizer, 40_000, {})
    with pytest.raises(ApiError, match="or more") as error:
        larger.prepare(ChatRequest(messages=(Message("user", words),)))
    assert isinstance(error.value, PromptTooLongError)
    assert 40_000 < error.value.num_tokens < whole


def test_a_prompt_that_just_fits_is_not_refused_by_its_size(builder: PromptBuilder) -> None:
    longest = max(builder.tokenizer.tokenizer.tokens(), key=len).decode()
    prompt = longest * 1900
    assert len(builder.prepare(CompletionRequest(prompt=prompt)).request.prompt) < 2000


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"properties": {"a": {"type": "nonsense"}}}, ".properties.a.type"),
        ({"$ref": "#/x"}, ".$ref"),
        ({"items": {"minLength": "x"}}, ".items.minLength"),
    ],
)
def test_errors_of_a_schema_name_a_path_in_the_body(builder: PromptBuilder, schema: dict[str, Any], param: str) -> None:
    error = refusal(builder, ChatRequest(messages=HI, response_schema=schema))
    assert error is not None
    assert error.param == f"response_format{param}"
    assert error.message.startswith(f"`{error.param}`: ")


def test_keywords_of_a_tool_that_are_not_enforced_are_noted(builder: PromptBuilder) -> None:
    function = {"name": "f", "parameters": {"properties": {"a": {"type": "array", "uniqueItems": True}}}}
    request = ChatRequest(messages=HI, tools=({"type": "function", "function": function},), notes=("first",))
    place = "`tools[0].function.parameters.properties.a.uniqueItems`"
    note = f"{place} is not enforced: this schema feature is not supported"
    assert builder.prepare(request).notes == ("first", note)
    as_written = replace(builder, constrains_arguments=False).prepare(request)
    assert (as_written.request.grammar, as_written.notes) == (None, ("first",))


def parse_chat(fields: dict[str, Any]) -> ChatRequest:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return parse(ChatBody, json.dumps(body).encode()).to_chat_request()


def parse_responses(fields: dict[str, Any]) -> ChatRequest:
    return to_responses_request(parse(ResponsesBody, json.dumps({"input": "Hi", **fields}).encode()))


def parse_messages(fields: dict[str, Any]) -> ChatRequest:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return to_messages_request(parse(MessagesBody, json.dumps(body).encode()))


UNIQUE = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
FIRST, SECOND = {"name": "e"}, {"name": "f", "parameters": UNIQUE}


@pytest.mark.parametrize(
    ("request_", "place"),
    [
        (
            parse_chat({"tools": [{"type": "function", "function": function} for function in (FIRST, SECOND)]}),
            "tools[1].function.parameters",
        ),
        (
            parse_chat(
                {
                    "tools": [{"type": "function", "function": function} for function in (FIRST, SECOND)],
                    "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [{"name": "f"}]}},
                }
            ),
            "tools[1].function.parameters",
        ),
        (
            parse_responses(
                {
                    "tools": [
                        {"type": "web_search"},
                        {"type": "namespace", "name": "n", "tools": [{"type": "function", **FIRST}]},
                        {"type": "namespace", "name": "m", "tools": [{"type": "function", **SECOND}]},
                    ]
                }
            ),
            "tools[2].tools[0].parameters",
        ),
        (
            parse_messages({"tools": [{"name": "e", "input_schema": {}}, {"name": "f", "input_schema": UNIQUE}]}),
            "tools[1].input_schema",
        ),
    ],
    ids=["chat", "allowed tools", "responses", "messages"],
)
def test_the_place_of_a_schema_is_that_in_the_body(builder: PromptBuilder, request_: ChatRequest, place: str) -> None:
    (note,) = [note for note in builder.prepare(request_).notes if "not enforced" in note]
    assert note.startswith(f"`{place}.properties.a.uniqueItems` is not enforced: ")


def test_a_token_id_outside_the_vocabulary_is_named(builder: PromptBuilder) -> None:
    error = refusal(builder, ChatRequest(messages=HI, logit_bias=((5, 1.0), (999_999, 1.0))))
    assert error is not None
    assert error.param == "logit_bias.999999"


def test_a_prompt_that_is_too_long_names_the_field_of_its_api(builder: PromptBuilder) -> None:
    error = refusal(builder, ChatRequest(messages=HI * 1_000, messages_name="input"))
    assert error is not None
    assert (error.code, error.param) == ("context_length_exceeded", "input")


def test_errors_for_the_client_have_no_folders(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(KIMI_MINI, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors")))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    broken = PromptBuilder(ChatTokenizer.load(folder), 2000, {})
    with pytest.raises(ApiError) as error:
        broken.prepare(ChatRequest(messages=HI))
    assert error.value.message == "`chat_template.jinja` line 1: roles must alternate"
    assert error.value.hint is not None
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ApiError, match=r"no chat template.*use /v1/completions") as error:
        PromptBuilder(ChatTokenizer.load(folder), 2000, {}).prepare(ChatRequest(messages=HI))
    assert str(tmp_path) not in error.value.message


@pytest.mark.parametrize("model", [ChatBody, CompletionBody])
def test_sampling_fields_reach_the_engine(builder: PromptBuilder, model: type[ChatBody] | type[CompletionBody]) -> None:
    penalties = {"frequency_penalty": 0.5, "presence_penalty": -1.5, "repetition_penalty": 1.2}
    fields = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "min_tokens": 4, **penalties}
    body = parse(model, json.dumps(fields).encode())
    request = body.to_chat_request() if isinstance(body, ChatBody) else body.to_completion_requests()[0]
    prepared = builder.prepare(request)
    assert {name: getattr(prepared.request.sampling, name) for name in penalties} == penalties
    assert prepared.request.min_tokens == 4
