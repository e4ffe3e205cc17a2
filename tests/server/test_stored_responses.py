"""The Responses API: responses that are kept in memory, hosted tools, sealed reasoning, and its other routes.

Objects and events are checked with the types of the `openai` package.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from openai.types.responses.compacted_response import CompactedResponse
from pydantic import TypeAdapter

from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.http.security import Security
from kimi_mlx.server.server import ServingOptions
from kimi_mlx.session.session import Session
from tests.fakes import KIMI_MINI, FixedSession
from tests.server import raw
from tests.server.running_server import RunningServer, serving, wait_until

SUM = "What is 12 + 34?"
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
ITEM: TypeAdapter[ResponseItem] = TypeAdapter(ResponseItem)
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
HOSTED: list[Any] = [
    {"type": "web_search"},
    {"type": "web_search_preview"},
    {"type": "tool_search"},
    {"type": "mcp", "server_label": "docs", "server_url": "https://example.org", "require_approval": "never"},
    {"type": "image_generation"},
    {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "file_search", "vector_store_ids": ["vs"]},
    {"type": "computer_use_preview", "display_height": 1, "display_width": 1, "environment": "browser"},
]


def post(server: RunningServer, path: str, body: dict[str, Any], key: str | None = None, method: str = "POST") -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    data = json.dumps(body).encode() if method == "POST" else b""
    response = raw.request(server.port, method, f"/v1/responses{path}", data, headers)
    return response.status, json.loads(response.body)


def create(server: RunningServer, **fields: Any) -> dict[str, Any]:
    status, response = post(server, "", {"temperature": 0, "max_output_tokens": 60, **fields})
    assert status == 200, response
    Response.model_validate(response, strict=True)
    return response


def get(server: RunningServer, path: str, key: str | None = None, method: str = "GET") -> Any:
    return post(server, path, {}, key, method)


def test_a_conversation_continues_by_the_id_of_a_response(running: RunningServer) -> None:
    first = create(running, input=SUM, instructions="Be brief.", tools=HOSTED[:1])
    second = create(running, input="And plus 1?", previous_response_id=first["id"])
    assert (first["store"], second["previous_response_id"]) == (True, first["id"])
    history = [{"role": "user", "content": SUM}, *first["output"], {"role": "user", "content": "And plus 1?"}]
    whole = create(running, input=history)
    assert texts(whole) == texts(second)
    assert whole["usage"]["input_tokens"] == second["usage"]["input_tokens"]
    counted = post(running, "/input_tokens", {"input": "And plus 1?", "previous_response_id": first["id"]})
    assert counted == (200, {"object": "response.input_tokens", "input_tokens": second["usage"]["input_tokens"]})
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    referring = create(running, input=[history[0], *references, history[-1]])
    assert texts(referring) == texts(second)
    assert get(running, f"/{second['id']}") == (200, second)
    status, page = get(running, f"/{referring['id']}/input_items?order=asc&limit=100")
    assert status == 200
    assert [ITEM.validate_python(item).type for item in page["data"]] == ["message", *types(first), "message"]
    status, chained = get(running, f"/{second['id']}/input_items?order=asc&limit=2")
    assert (status, chained["has_more"], len(chained["data"])) == (200, True, 2)
    rest = get(running, f"/{second['id']}/input_items?order=asc&after={chained['last_id']}")[1]
    assert [item["type"] for item in chained["data"] + rest["data"]] == [item["type"] for item in page["data"]]
    for id in (first["id"], second["id"]):
        assert get(running, f"/{id}", method="DELETE")[1] == {"id": id, "object": "response", "deleted": True}
    status, error = post(running, "", {"input": "x", "previous_response_id": first["id"]})
    assert (status, error["error"]["code"]) == (400, "previous_response_not_found")


def texts(response: dict[str, Any]) -> list[Any]:
    return [part["text"] for item in response["output"] for part in item.get("content", [])]


def types(response: dict[str, Any]) -> list[str]:
    return [item["type"] for item in response["output"]]


def test_a_response_that_is_not_kept(running: RunningServer) -> None:
    response = create(running, input=SUM, store=False)
    assert response["store"] is False
    assert get(running, f"/{response['id']}")[0] == 404
    for path in ("", "/cancel", "/input_items"):
        method = "POST" if path == "/cancel" else "GET"
        status, body = get(running, f"/resp_unknown{path}", method=method)
        assert (status, body["error"]["type"]) == (404, "invalid_request_error")


@pytest.mark.slow
def test_hosted_tools_are_left_out_with_a_note(running: RunningServer) -> None:
    with_hosted = create(running, input=SUM, tools=[*HOSTED, WEATHER], store=False)
    note = with_hosted["metadata"]["kimi_mlx_notes"]
    assert note.startswith(
        "left out, because they run at OpenAI: web_search, web_search_preview, tool_search, mcp `docs`"
    )
    without = create(running, input=SUM, tools=[WEATHER], store=False)
    assert with_hosted["usage"]["input_tokens"] == without["usage"]["input_tokens"]
    assert "kimi_mlx_notes" not in without["metadata"]


def test_sealed_reasoning_and_incomplete_items(running: RunningServer) -> None:
    include = ["reasoning.encrypted_content"]
    whole = create(running, input=SUM, store=False, include=include)
    reasoning = whole["output"][0]
    call = {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "4"}
    sealed = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": reasoning["encrypted_content"]}
    counts = [
        post(running, "/input_tokens", {"input": [{"role": "user", "content": SUM}, item, call, result]})[1]
        for item in (sealed, {**reasoning, "encrypted_content": None}, {**sealed, "encrypted_content": "gAAAA"})
    ]
    assert counts[0] == counts[1] != counts[2]
    cut = create(running, input=SUM, store=False, reasoning={"effort": "none"}, max_output_tokens=3)
    assert (cut["status"], cut["output"][-1]["status"]) == ("incomplete", "incomplete")


def test_events_of_a_stream_have_the_types_of_the_client(running: RunningServer) -> None:
    body = {"input": "What is the weather in Paris?", "tools": [WEATHER, *HOSTED], "stream": True, "temperature": 0}
    lines = raw.request(running.port, "POST", "/v1/responses", json.dumps(body).encode()).body.decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    for event in events:
        EVENT.validate_python(event, strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert get(running, f"/{events[-1]['response']['id']}") == (200, events[-1]["response"])


@pytest.mark.slow
def test_a_response_in_the_background(running: RunningServer) -> None:
    queued = create(running, input=SUM, background=True)
    assert (queued["status"], queued["background"]) == ("queued", True)
    wait_until(lambda: get(running, f"/{queued['id']}")[1]["status"] not in ("queued", "in_progress"))
    status, done = get(running, f"/{queued['id']}")
    Response.model_validate(done, strict=True)
    assert (status, done["status"], texts(done)[0] != "") == (200, "completed", True)
    assert get(running, f"/{queued['id']}/cancel", method="POST") == (200, done)
    for fields, param in (({"store": False}, "background"), ({"stream": True}, "stream")):
        status, error = post(running, "", {"input": SUM, "background": True, **fields})
        assert (status, error["error"]["param"]) == (400, param)


@pytest.mark.slow
def test_compaction(running: RunningServer) -> None:
    status, compacted = post(running, "/compact", {"model": "kimi-mini", "input": SUM, "max_output_tokens": 40})
    assert status == 200
    CompactedResponse.model_validate({**compacted, "output": compacted["output"][-1:]})
    assert [ITEM.validate_python(item).type for item in compacted["output"]] == ["message", "compaction"]
    again = create(running, input=[*compacted["output"], {"role": "user", "content": SUM}], store=False)
    assert again["usage"]["input_tokens"] > compacted["usage"]["output_tokens"]


@pytest.mark.slow
def test_all_methods_of_the_client(client: openai.OpenAI) -> None:
    first = client.responses.create(model="kimi-mini", input=SUM, max_output_tokens=20)
    assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
    assert [item.type for item in client.responses.input_items.list(first.id)] == ["message"]
    assert client.responses.cancel(first.id).status == first.status
    counted = client.responses.input_tokens.count(model="kimi-mini", input=SUM, previous_response_id=first.id)
    assert first.usage is not None
    assert counted.input_tokens > first.usage.input_tokens
    compacted = client.responses.compact(model="kimi-mini", previous_response_id=first.id)
    assert [item.type for item in compacted.output] == ["message", "compaction"]
    with client.responses.stream(model="kimi-mini", input=SUM, previous_response_id=first.id) as stream:
        assert stream.until_done().get_final_response().previous_response_id == first.id
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="not found"):
        client.responses.retrieve(first.id)


@pytest.fixture(scope="module")
def with_keys(session: Session) -> Iterator[RunningServer]:
    options = ServingOptions(security=Security(keys=("one", "two")), keep_responses=3)
    with serving(session, options) as server:
        yield server


@pytest.mark.slow
def test_no_key_sees_the_responses_of_another(with_keys: RunningServer) -> None:
    body = {"input": SUM, "max_output_tokens": 4}
    own = post(with_keys, "", body, "one")[1]
    item = own["output"][0]["id"]
    path = f"/{own['id']}"
    assert get(with_keys, path, "one") == (200, own)
    assert get(with_keys, path, "two")[0] == get(with_keys, f"{path}/input_items", "two")[0] == 404
    assert get(with_keys, path, "two", "DELETE")[0] == get(with_keys, f"{path}/cancel", "two", "POST")[0] == 404
    assert post(with_keys, "", {**body, "previous_response_id": own["id"]}, "two")[0] == 400
    assert post(with_keys, "", {"input": [{"type": "item_reference", "id": item}]}, "two")[0] == 404
    for _ in range(3):
        post(with_keys, "", body, "two")
    assert get(with_keys, path, "one")[0] == 404  # dropped for newer ones


@pytest.fixture
def endless() -> Iterator[RunningServer]:
    ids = ChatTokenizer.load(KIMI_MINI).encode("And so on. ")
    session = FixedSession(ids, pause_s=0.01, is_endless=True)
    with serving(session) as server:
        yield server


@pytest.mark.parametrize("is_background", [False, True])
def test_cancelling_a_response(endless: RunningServer, is_background: bool) -> None:
    ids, ends = list[str](), list[dict[str, Any]]()
    thread = threading.Thread(target=read_stream, args=(endless, {"input": SUM, "stream": True}, ids, ends))
    if is_background:
        ids.append(create(endless, input=SUM, background=True, max_output_tokens=None)["id"])
    else:
        thread.start()
        wait_until(lambda: bool(ids))
    path = f"/{ids[0]}"
    assert get(endless, path)[1]["status"] == "in_progress"
    statuses = [get(endless, f"{path}/cancel", method="POST") for _ in range(3)]
    assert {(status, body["status"]) for status, body in statuses} == {(200, "cancelled")}
    wait_until(lambda: get(endless, path)[1]["status"] == "cancelled")
    endless.wait_idle()
    if not is_background:
        thread.join(30)
        EVENT.validate_python(ends[0], strict=True)
        assert get(endless, path)[1] == ends[0]["response"]
    assert endless.metric("kimi_mlx_answers_cancelled_total") == 1


@pytest.mark.slow
def test_deleting_a_response_while_it_is_streamed(endless: RunningServer) -> None:
    ids, ends = list[str](), list[dict[str, Any]]()
    thread = threading.Thread(
        target=read_stream, args=(endless, {"input": SUM, "stream": True, "max_output_tokens": 100}, ids, ends)
    )
    thread.start()
    wait_until(lambda: bool(ids))
    assert get(endless, f"/{ids[0]}", method="DELETE")[1]["deleted"]
    thread.join(30)
    assert ends[0]["type"] == "response.incomplete"
    assert get(endless, f"/{ids[0]}")[0] == 404


def read_stream(server: RunningServer, body: dict[str, Any], ids: list[str], ends: list[dict[str, Any]]) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        events: Any = client.responses.create(model="kimi-mini", **body)
        last: Any = None
        for event in events:
            if event.type == "response.created":
                ids.append(event.response.id)
            last = event
        ends.append(last.to_dict())
