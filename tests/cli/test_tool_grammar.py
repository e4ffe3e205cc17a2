"""Arguments of calls are held to the schemas of MCP tools, from their declaration to the text of a model."""

from __future__ import annotations

import json

import jsonschema
import pytest

from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.chat_model import ChatModel, ChatOptions
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.session.session import Session
from kimi_mlx.text.messages import ToolCall
from kimi_mlx.tools.declarations import ServerTool, declare
from tests.fakes import KIMI_MINI, chat_model_of

SCHEMAS = {
    "choice": {
        "title": "choiceArguments",
        "type": "object",
        "properties": {"unit": {"title": "Unit", "enum": ["celsius", "kelvin"], "type": "string"}},
        "required": ["unit"],
        "additionalProperties": False,
    },
    "limits": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {
            "count": {"type": "integer", "minimum": 3, "maximum": 12},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["count", "tags"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def model(session: Session) -> ChatModel:
    return chat_model_of(session, ChatTokenizer.load(KIMI_MINI))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_arguments_match_the_schema(model: ChatModel, name: str) -> None:
    declared, _ = declare([ServerTool("a", name, "Something else.", SCHEMAS[name])])
    tools = [tool.declaration for tool in declared]
    num_calls = 0
    for seed in range(6):
        options = ChatOptions(
            tools=tools,
            tool_choice="required",
            parallel_tool_calls=False,
            sampling={"temperature": 1.5, "seed": seed},
            max_tokens=400,
            template_kwargs={"thinking": False},
        )
        conversation = Conversation(model, options)
        list(conversation.ask("What is two plus two?"))
        for call in conversation.messages[-1].tool_calls:
            assert isinstance(call, ToolCall)
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[name])
            num_calls += 1
    assert num_calls >= 3
