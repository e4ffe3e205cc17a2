"""Options of thinking mean the same in every API, and become variables of the chat template."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kimi_mlx.server.anthropic.messages_body import MessagesBody
from kimi_mlx.server.anthropic.request import to_chat_request as from_anthropic
from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import parse
from kimi_mlx.server.openai.chat_request import ChatBody
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.openai.responses_request import to_chat_request as from_responses
from kimi_mlx.server.template_variables import nearest_effort, template_variables
from kimi_mlx.text.template import ChatTemplate

HI = {"role": "user", "content": "Hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatBody, json.dumps({"messages": [HI], **fields}).encode()).to_chat_request()


def responses(**fields: Any) -> ChatRequest:
    return from_responses(parse(ResponsesBody, json.dumps({"input": "Hi", **fields}).encode()))


def messages(**fields: Any) -> ChatRequest:
    return from_anthropic(parse(MessagesBody, json.dumps({"messages": [HI], **fields}).encode()))


@pytest.mark.parametrize(
    ("fields", "is_on"),
    [
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"thinking": {}}, True),
        ({"thinking": {"keep": "all"}}, True),
        ({"thinking": {"effort": "none"}}, False),
        ({"thinking": {"effort": "minimal"}}, False),
        ({"thinking": {"effort": "low"}}, True),
        ({"thinking": {"type": "disabled", "effort": "max"}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, False),
        *(({"reasoning_effort": effort}, True) for effort in ("low", "medium", "high", "xhigh", "max")),
    ],
)
def test_thinking_is_turned_on_or_off_in_all_apis(fields: dict[str, Any], is_on: bool) -> None:
    assert chat(**fields).thinking is is_on
    assert messages(**fields).thinking is is_on
    assert responses(**fields).thinking is is_on


def test_options_of_the_responses_api() -> None:
    assert responses(reasoning={"effort": "minimal"}).thinking is False
    assert responses(thinking={"keep": "all"}).keeps_reasoning
    assert responses(chat_template_kwargs={"preserve_thinking": True}).template_kwargs == {"preserve_thinking": True}


def test_without_options_the_apis_differ() -> None:
    assert chat().thinking is None
    assert messages().thinking is False
    assert messages(output_config={"effort": "high"}).thinking is False


@pytest.mark.parametrize(
    "fields", [{"reasoning_effort": "huge"}, {"thinking": {"effort": "huge"}}, {"thinking": {"type": "on"}}]
)
def test_unknown_values_are_refused(fields: dict[str, Any]) -> None:
    for read in (chat, messages, responses):
        with pytest.raises(ApiError, match=r"must be 'enabled'|must be 'none', 'minimal', 'low'"):
            read(**fields)


@pytest.mark.parametrize(
    ("fields", "is_on"),
    [
        ({"chat_template_kwargs": {"thinking": False}, "reasoning_effort": "high"}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"enable_thinking": False}, False),
        ({"reasoning": {"enabled": False}}, False),
        ({"reasoning": {"effort": "high"}}, True),
        ({"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": False}}, True),
        ({"thinking": {"keep": "all"}, "chat_template_kwargs": {"thinking": False}}, False),
    ],
)
def test_other_switches_of_chat_completions(fields: dict[str, Any], is_on: bool) -> None:
    assert chat(**fields).thinking is is_on


TEMPLATE = ChatTemplate(
    "{{ messages }}{% if reasoning_effort == 'low' %}a{% elif reasoning_effort == 'max' %}b{% endif %}"
)


@pytest.mark.parametrize(
    ("effort", "expected"), [("none", "low"), ("low", "low"), ("medium", "low"), ("xhigh", "max"), ("max", "max")]
)
def test_a_template_gets_the_nearest_effort_that_it_names(effort: str, expected: str) -> None:
    assert template_variables(ChatRequest(effort=effort), TEMPLATE) == {"reasoning_effort": expected}


def test_variables_of_the_request_take_precedence() -> None:
    kwargs = {"reasoning_effort": "own", "preserve_thinking": False}
    request = ChatRequest(effort="low", keeps_reasoning=True, template_kwargs=kwargs)
    assert template_variables(request, TEMPLATE) == kwargs
    assert template_variables(ChatRequest(effort="low"), ChatTemplate("{{ messages }}")) == {}
    assert nearest_effort("high", ()) == "high"
