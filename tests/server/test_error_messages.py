"""Error messages for invalid requests, and model names in all APIs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kimi_mlx.server.preparation import SHORT_BODY_BYTES
from tests.server import raw
from tests.server.running_server import RunningServer, wait_until

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "`messages`: required field is missing"),
        (HI | {"temperature": 9}, "`temperature`: is 9, but must be at most 2.0"),
        (HI | {"frequency_penalty": -2.5}, "`frequency_penalty`: is -2.5, but must be at least -2.0"),
        (HI | {"repetition_penalty": 0}, "`repetition_penalty`: is 0, but must be at least 0.01"),
        (HI | {"min_tokens": 9, "max_tokens": 8}, "`min_tokens` is 9, but must be at most `max_tokens`, 8"),
        (HI | {"stop": ["a"] * 5}, "`stop`: has 5 items, but at most 4 are allowed"),
        (HI | {"max_tokens": "x"}, "`max_tokens`: must be an integer"),
        (HI | {"stream": "x"}, "`stream`: must be true or false"),
    ],
)
def test_invalid_fields_are_explained(running: RunningServer, fields: dict[str, Any], message: str) -> None:
    body = json.dumps(fields).encode()
    assert raw.request(running.port, "POST", "/v1/chat/completions", body).error["message"] == message


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("completions", {"prompt": ["a"] * 65}, "`prompt`: has 65 items, but 1 to 64 are allowed"),
        ("completions", {"prompt": [[1]] * 65}, "`prompt`: has 65 items, but 1 to 64 are allowed"),
        ("completions", {"prompt": [[1, "x"]]}, "`prompt[0][1]`: must be an integer"),
        ("messages", HI | {"system": 5}, "`system`: must be a string or a list"),
        ("messages", HI | {"system": [{"type": "text"}]}, "`system[0].text`: required field is missing"),
        ("responses", {"input": "hi", "tool_choice": {"type": 4}}, "`tool_choice.type`: must be a string"),
    ],
)
def test_errors_of_a_field_with_several_types_name_the_location(
    running: RunningServer, path: str, fields: dict[str, Any], message: str
) -> None:
    response = raw.request(running.port, "POST", f"/v1/{path}", json.dumps(fields).encode())
    assert (response.status, response.error["message"]) == (400, message)


REQUIRED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": HI | {"max_tokens": 1},
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/responses": {"input": "hi", "max_output_tokens": 1},
    "/v1/responses/input_tokens": {"input": "hi"},
    "/v1/messages": HI | {"max_tokens": 1},
    "/v1/messages/count_tokens": HI,
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5]},
}


@pytest.mark.parametrize("path", REQUIRED)
def test_every_optional_field_may_be_null(running: RunningServer, path: str) -> None:
    document = json.loads(raw.request(running.port, path="/openapi.json").body)
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    fields = document["components"]["schemas"][content["schema"]["$ref"].rsplit("/", 1)[1]]["properties"]
    body = dict.fromkeys(fields) | REQUIRED[path]
    response = raw.request(running.port, "POST", path, json.dumps(body).encode())
    assert (response.status, len(body) > len(REQUIRED[path])) == (200, True), response.body


@pytest.mark.parametrize("path", REQUIRED)
def test_long_bodies_have_the_same_responses_as_short_ones(running: RunningServer, path: str) -> None:
    """Long bodies are prepared in another process; spaces make a body long."""
    for fields in (
        {"temperature": 0, "top_logprobs": None},
        {"temperature": 9},
        {"messages": 5, "input": 5, "prompt": 5},
    ):
        short = json.dumps(REQUIRED[path] | fields).encode()
        responses = [raw.request(running.port, "POST", path, body) for body in (short, short + b" " * SHORT_BODY_BYTES)]
        statuses, bodies = [response.status for response in responses], [json.loads(r.body) for r in responses]
        assert statuses[0] == statuses[1]
        for body in bodies:
            for name in ("id", "created", "created_at", "completed_at", "output"):
                body.pop(name, None)
        assert bodies[0] == bodies[1]


def test_a_wrong_base_url_is_explained(running: RunningServer) -> None:
    response = raw.request(running.port, "POST", "/v2/chat/completions", b"{}")
    assert response.status == 404
    assert "ends in `/v1`" in response.error["message"]
    assert "/v1/chat/completions, " in response.error["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/responses", {"input": "hi", "max_output_tokens": 3}), ("/v1/messages", HI | {"max_tokens": 3})],
)
def test_the_model_name_is_optional(running: RunningServer, path: str, fields: dict[str, Any]) -> None:
    response = raw.request(running.port, "POST", path, json.dumps(fields).encode())
    assert (response.status, json.loads(response.body)["model"]) == (200, "kimi-mini")


def test_models_are_listed_for_every_api(running: RunningServer) -> None:
    listed = json.loads(raw.request(running.port).body)
    (model,) = listed["data"]
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, "kimi-mini", "kimi-mini")
    assert (model["type"], model["display_name"], model["aliases"]) == ("model", "kimi-mini", ["mini", "default"])
    assert model["created_at"].endswith("Z")
    assert (model["architecture"]["input_modalities"], model["supports_image_in"]) == (["text"], False)
    raw.request(running.port, path="/v1/models/mini")
    wait_until(lambda: running.metric('kimi_mlx_requests_total{route="/v1/models/{name}",status="200"}') >= 1)
