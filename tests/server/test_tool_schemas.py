"""Arguments of tool calls follow the schemas of their tools, in every API, with every `tool_choice`."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import jsonschema
import openai
import pytest

from kimi_mlx.server.server import ServingOptions
from kimi_mlx.session.session import Session
from kimi_mlx.text.tokenizer import Tokenizer
from tests.fakes import KIMI_MINI
from tests.server.running_server import RunningServer, serving
from tests.tool_schemas import COUNT, KINDS, NOT_ENFORCED, arguments

ALL = [pytest.param(schema, id=f"{kind}-{at}") for kind, schemas in KINDS.items() for at, schema in enumerate(schemas)]
SECTION_BEGIN = Tokenizer.load(KIMI_MINI).special_tokens["<|tool_calls_section_begin|>"]
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Use a tool."}],
    "parallel_tool_calls": False,
    "max_tokens": 250,
    "temperature": 1.2,
}
CALLS = {"logit_bias": {str(SECTION_BEGIN): 100}}
"""Makes the model call a tool although calls are optional."""


def body_for(schema: Any, **fields: Any) -> dict[str, Any]:
    """Return a request with two tools, of which the first one has the schema."""
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("one", "other")]
    return {**BODY, "tools": tools, "seed": 1, **fields}


def answer(running: RunningServer, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx2.post(f"{running.url}/v1/chat/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return response.json()


def check_call(running: RunningServer, schema: Any, **fields: Any) -> None:
    """Check the arguments of a call. An answer that is cut off needs none if calls are optional."""
    found = answer(running, body_for(schema, **fields))["choices"][0]
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] in ("one", "other")
    if found["finish_reason"] == "length" and "logit_bias" in fields:
        return
    is_draft_4 = '"exclusiveMinimum": true' in json.dumps(schema)
    validator = jsonschema.Draft4Validator if is_draft_4 else jsonschema.Draft202012Validator
    validator(schema).validate(json.loads(call["function"]["arguments"]))


@pytest.mark.parametrize(
    "schema",
    [
        KINDS["ranges"][0],
        *(pytest.param(schema, marks=pytest.mark.slow) for schema in (KINDS["oneOf"][1], KINDS["references"][0])),
    ],
)
def test_arguments_of_optional_calls_are_valid(running: RunningServer, schema: Any) -> None:
    check_call(running, schema, **CALLS)


@pytest.mark.sweep
@pytest.mark.parametrize("fields", [CALLS, {"tool_choice": "required"}])
@pytest.mark.parametrize("schema", ALL)
def test_arguments_of_every_kind_of_schema(running: RunningServer, schema: Any, fields: dict[str, Any]) -> None:
    for seed in range(3):
        check_call(running, schema, **fields, seed=seed)


@pytest.mark.slow
def test_a_required_call_is_complete_when_tokens_run_out(running: RunningServer) -> None:
    endless = arguments(text={"type": "string", "minLength": 10}, rows={"type": "array", "items": arguments(n=COUNT)})
    found = answer(running, body_for(endless, tool_choice="required", max_tokens=64))["choices"][0]
    (call,) = found["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), endless)
    assert found["finish_reason"] == "length"


@pytest.mark.slow
def test_streams_have_the_same_calls(client: openai.OpenAI, running: RunningServer) -> None:
    body = body_for(KINDS["values"][1], **CALLS)
    expected = answer(running, body)["choices"][0]["message"]["tool_calls"][0]["function"]
    chunks = list(client.chat.completions.create(model="kimi-mini", stream=True, **body))
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert "".join(part.function.name or "" for part in parts if part.function) == expected["name"]
    assert "".join(part.function.arguments or "" for part in parts if part.function) == expected["arguments"]


def test_notes_on_keywords_that_are_not_enforced(running: RunningServer) -> None:
    path, schema = ".properties.a.uniqueItems", NOT_ENFORCED[".properties.a.uniqueItems"]
    note = f"`tools[0].function.parameters{path}` is not enforced: this schema feature is not supported"
    body = body_for(schema, max_tokens=1)
    del body["tools"][1]
    assert answer(running, body)["kimi_mlx_notes"] == [note]
    stream = httpx2.post(f"{running.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60).text
    last = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")][-1]
    assert last["kimi_mlx_notes"] == [note]
    tool = {"name": "one", "input_schema": schema}
    message = {"model": "kimi-mini", "max_tokens": 1, "messages": BODY["messages"], "tools": [tool]}
    response = httpx2.post(f"{running.url}/v1/messages", json=message, timeout=60).json()
    assert response["kimi_mlx_notes"] == [note.replace("function.parameters", "input_schema")]
    tool = {"type": "function", "name": "one", "parameters": schema}
    response = httpx2.post(
        f"{running.url}/v1/responses", json={"input": "hi", "tools": [tool], "max_output_tokens": 1}, timeout=60
    ).json()
    assert response["metadata"]["kimi_mlx_notes"] == note.replace("function.parameters", "parameters")


def test_a_schema_of_an_answer_is_refused_with_its_keyword(running: RunningServer) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": NOT_ENFORCED[".properties.a.contains"]}}
    response = httpx2.post(f"{running.url}/v1/chat/completions", json={**BODY, "response_format": form}, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format.json_schema.schema.properties.a.contains"


def test_arguments_as_written(session: Session) -> None:
    body = body_for(arguments(a={"const": "x" * 40}), **CALLS, max_tokens=30)
    with serving(session, ServingOptions(constrains_arguments=False)) as running:
        text = json.dumps(answer(running, body)["choices"][0]["message"])
        assert "xxxx" not in text
