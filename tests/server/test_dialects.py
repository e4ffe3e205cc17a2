"""Requests of clients written for other servers: long prompts, Moonshot's options, constraints, odd paths, history."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from kimi_mlx.server.http.security import Security
from kimi_mlx.server.server import ServingOptions
from kimi_mlx.session.session import Session
from tests.server import raw
from tests.server.running_server import RunningServer, serving

HI: dict[str, Any] = {"role": "user", "content": "hi"}
LONG = "9 8 " * 35_000

OPENAI_MESSAGE = re.compile(
    r"This model's maximum context length is (\d+) tokens\. However, your messages resulted in (\d+) tokens"
    r"( or more)?\. Please reduce the length of the messages\."
)
ANTHROPIC_MESSAGE = re.compile(r"prompt is too long: (\d+) tokens > (\d+) maximum")


def post(running: RunningServer, path: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{running.url}{path}", json=body, timeout=60)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("/v1/chat/completions", {"messages": [HI], "tools": [{"type": "function", "function": {
            "name": "f", "description": LONG}}]}, "messages"),
        ("/v1/chat/completions", {"messages": [HI] * 30_000}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "stream": True}, "messages"),
        ("/v1/responses", {"input": LONG}, "input"),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": ["hi", [5] * 70_000]}, None),
        ("/v1/completions", {"prompt": ["hi", LONG]}, "prompt[1]"),
    ],
    ids=["chat", "tools", "many messages", "stream", "responses", "text", "mixed prompts", "several prompts"],
)  # fmt: skip
def test_openais_message_for_prompts_that_are_too_long(
    running: RunningServer, path: str, body: dict[str, Any], param: str | None
) -> None:
    response = post(running, path, **body)
    assert response.status_code == 400
    if param is None:  # prompts of two types are not supported
        return
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "context_length_exceeded", param)
    words = OPENAI_MESSAGE.fullmatch(error["message"])
    assert words is not None, error["message"]
    assert int(words[2]) > int(words[1]) == 65_536


def test_anthropics_message_for_prompts_that_are_too_long(running: RunningServer) -> None:
    for stream in (False, True):
        response = post(
            running, "/v1/messages", max_tokens=5, messages=[{"role": "user", "content": LONG}], stream=stream
        )
        assert response.status_code == 400
        error = response.json()["error"]
        words = ANTHROPIC_MESSAGE.fullmatch(error["message"])
        assert words is not None, error["message"]
        assert (error["type"], int(words[2])) == ("invalid_request_error", 65_536)
        assert int(words[1]) > 65_536


def test_counts_of_long_prompts_have_a_limit(running: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": LONG}]}
    assert post(running, "/v1/messages/count_tokens", **body).json()["input_tokens"] > 65_536
    body["messages"] = [HI] * 55_000
    response = post(running, "/v1/messages/count_tokens", **body)
    assert response.status_code == 400  # more lists and objects than a body may have


def count(running: RunningServer, *messages: dict[str, Any], **fields: Any) -> int:
    """Return the number of prompt tokens of a conversation in Chat Completions."""
    path = "/v1/chat/completions/input_tokens"
    response = post(running, path, messages=messages, **fields)
    assert response.status_code == 200, response.text
    return response.json()["input_tokens"]


THOUGHT = {"role": "assistant", "content": "Hello", "reasoning_content": "They greet me, so I greet them, too."}


def test_moonshots_keep_all_keeps_earlier_reasoning(running: RunningServer) -> None:
    without = count(running, HI, THOUGHT, HI)
    kept = count(running, HI, THOUGHT, HI, chat_template_kwargs={"preserve_thinking": True})
    assert kept > without
    assert count(running, HI, THOUGHT, HI, thinking={"type": "enabled", "keep": "all"}) == kept
    assert count(running, HI, THOUGHT, HI, thinking={"keep": "all"}) == kept
    assert count(running, HI, THOUGHT, HI, thinking={"type": "enabled", "keep": None}) == without
    assert count(running, HI, THOUGHT, HI, thinking={}) == without


def test_clear_thinking_of_the_messages_api(running: RunningServer) -> None:
    blocks = [{"type": "thinking", "thinking": THOUGHT["reasoning_content"]}, {"type": "text", "text": "Hello"}]

    def count_messages(keep: Any) -> int:
        edits = [{"type": "clear_thinking_20251015", "keep": keep}]
        messages = [HI, {"role": "assistant", "content": blocks}, HI]
        fields = {"thinking": {"type": "enabled"}, "context_management": {"edits": edits}}
        response = post(running, "/v1/messages/count_tokens", messages=messages, **fields)
        return response.json()["input_tokens"]

    kept = count(running, HI, THOUGHT, HI, thinking={"keep": "all"})
    assert count_messages("all") == kept
    assert count_messages({"type": "thinking_turns", "value": 1}) < kept


def test_a_partial_message_with_a_name(running: RunningServer) -> None:
    partial = {"role": "assistant", "content": "I", "partial": True}
    plain = count(running, HI, partial)
    assert count(running, HI, {**partial, "name": "Doctor Kelsier of the North"}) > plain


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"guided_choice": ["left", "right"]}, r"left|right"),
        ({"guided_choice": ["left", "right"], "thinking": {"type": "enabled"}}, r"left|right"),
        ({"structured_outputs": {"choice": ["yes/no", 'a "quote"']}}, r'yes/no|a "quote"'),
        ({"guided_regex": r"[a-c]{3}/\d"}, r"[a-c]{3}/\d"),
        ({"regex": r"x\/y"}, "x/y"),
        ({"structured_outputs": {"regex": "(ab){1,3}c"}}, "(ab){1,3}c"),
        ({"grammar": 'root ::= "one " ("two" | "three")'}, "one (two|three)"),
        ({"guided_grammar": 'start: "a" B\nB: /[0-9]/'}, "a[0-9]"),
        ({"ebnf": 'root ::= digit digit\ndigit ::= [0-9]'}, "[0-9]{2}"),
        ({"guided_json": {"enum": [7]}}, "7"),
        ({"guided_json": '{"enum": [7]}'}, "7"),
        ({"structured_outputs": {"json": {"const": "x"}}}, '"x"'),
        ({"json_schema": {"enum": [True]}}, "true"),
        ({"response_format": {"type": "json_object", "schema": {"enum": [3]}}}, "3"),
        ({"response_format": {"type": "json_schema", "schema": {"enum": [4]}}}, "4"),
    ],
)  # fmt: skip
def test_constraints_of_other_servers(running: RunningServer, fields: dict[str, Any], allowed: str) -> None:
    body = {"messages": [HI], "thinking": {"type": "disabled"}, "max_tokens": 100, "temperature": 0, **fields}
    (choice,) = post(running, "/v1/chat/completions", **body).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert re.fullmatch(allowed, choice["message"]["content"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"grammar": "root ::= other"}, "grammar"),
        ({"guided_grammar": "start: missing"}, "guided_grammar"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json.type"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "guided_regex"),
        ({"structured_outputs": {"structural_tag": {}, "regex": "a"}}, None),
        ({"structured_outputs": {"structural_tag": {"x": 1}}}, "structured_outputs.structural_tag"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"thinking": {"effort": "huge"}}, "thinking.effort"),
        ({"thinking": {"keep": "some"}}, "thinking.keep"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"mirostat": 2}, "mirostat"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True}, "messages[0]"),
    ],
)
def test_unsupported_and_invalid_fields_are_refused_by_name(
    running: RunningServer, fields: dict[str, Any], param: str | None
) -> None:
    response = post(running, "/v1/chat/completions", messages=[HI], max_tokens=1, **fields)
    if param is None:
        assert response.status_code == 200, response.text
    else:
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_values_without_effect_are_accepted(running: RunningServer) -> None:
    neutral = {"bad_words": [], "mirostat": 0, "use_beam_search": False, "grammar": "", "guided_json": None}
    ignored = {"user": "u", "verbosity": "low", "prompt_cache_key": "k", "id_slot": 3, "cache_prompt": True}
    response = post(running, "/v1/chat/completions", messages=[HI], max_tokens=-1, **neutral, **ignored)
    assert response.status_code == 200
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_the_messages_api_refuses_constraints_by_name(running: RunningServer) -> None:
    response = post(running, "/v1/messages", max_tokens=1, guided_choice=["a"], messages=[HI])
    assert response.status_code == 400
    assert "guided_choice" in response.json()["error"]["message"]


@pytest.mark.slow
def test_constraints_and_stop_tokens_of_plain_completions(running: RunningServer) -> None:
    def complete(**fields: Any) -> Any:
        return post(running, "/v1/completions", prompt="The", temperature=0, **fields).json()

    for fields, allowed in (
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"response_format": {"type": "json_object", "schema": {"enum": [12]}}}, "12"),
    ):
        (choice,) = complete(max_tokens=50, **fields)["choices"]
        assert re.fullmatch(allowed, choice["text"])
        assert choice["finish_reason"] == "stop"
    assert complete(guided_regex="(")["error"]["param"] == "guided_regex"
    answer = complete(max_tokens=6)
    tokens = post(running, "/tokenize", prompt=answer["choices"][0]["text"], add_special_tokens=False).json()["tokens"]
    (choice,) = complete(max_tokens=6, stop_token_ids=tokens[1:2])["choices"]
    assert choice["finish_reason"] == "stop"
    assert answer["choices"][0]["text"].startswith(choice["text"])
    assert len(choice["text"]) < len(answer["choices"][0]["text"])
    assert complete(stop_token_ids=[10**6])["error"]["param"] == "stop_token_ids[0]"
    assert complete(max_tokens=70, ignore_eos=True)["usage"]["completion_tokens"] == 70
    assert complete(ignore_eos=True)["error"]["param"] == "ignore_eos"


def test_ignore_eos_in_a_chat(running: RunningServer) -> None:
    usage = post(running, "/v1/chat/completions", messages=[HI], max_tokens=40, ignore_eos=True).json()["usage"]
    assert usage["completion_tokens"] == 40


@pytest.mark.slow
def test_reasoning_can_be_left_out_of_the_response(running: RunningServer) -> None:
    for fields in ({"include_reasoning": False}, {"reasoning": {"exclude": True}}):
        body = {"messages": [HI], "temperature": 0, **fields}
        message = post(running, "/v1/chat/completions", **body).json()["choices"][0]["message"]
        assert "reasoning_content" not in message
        assert "reasoning_content" not in post(running, "/v1/chat/completions", stream=True, **body).text


OLDER_CHAT = [
    HI,
    {"role": "assistant", "content": [
        {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "weather"}},
        {"type": "web_search_tool_result", "tool_use_id": "s1", "content": [
            {"type": "web_search_result", "url": "https://example.org", "title": "W", "encrypted_content": "x" * 999}]},
        {"type": "text", "text": "It rains."}]},
    {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "sun"}},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}},
        {"id": "c2", "type": "local_shell_call", "action": {"command": ["ls"]}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "done"},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "a"}, {"type": "file", "file": {}}]},
    HI,
]  # fmt: skip


def test_hosted_calls_in_older_history_are_read(running: RunningServer) -> None:
    response = post(running, "/v1/chat/completions", messages=OLDER_CHAT, max_tokens=1)
    assert response.status_code == 200, response.text
    messages = [HI, OLDER_CHAT[1], HI]
    response = post(running, "/v1/messages", messages=messages, max_tokens=1)
    assert response.status_code == 200, response.text


def test_text_documents_are_read(running: RunningServer) -> None:
    def count_with(*blocks: dict[str, Any]) -> int:
        messages = [{"role": "user", "content": list(blocks)}]
        response = post(running, "/v1/messages/count_tokens", messages=messages)
        assert response.status_code == 200, response.text
        return response.json()["input_tokens"]

    question = {"type": "text", "text": "What?"}
    source = {"type": "text", "media_type": "text/plain", "data": "The key is under the mat."}
    document = {"type": "document", "source": source, "title": "Note", "citations": {"enabled": True}}
    text = {"type": "text", "text": "Note\nThe key is under the mat."}
    assert count_with(document, question) == count_with(text, question)


def test_a_response_has_a_request_id_under_both_names(running: RunningServer) -> None:
    headers = raw.request(running.port, "GET", "/v1/models").headers
    assert headers["request-id"] == headers["x-request-id"]


@pytest.fixture(scope="module")
def protected(session: Session) -> Iterator[RunningServer]:
    with serving(session, ServingOptions(Security(keys=("key",)), max_body_bytes=2000)) as server:
        yield server


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/",
        "/models",
        "/v1/v1/models",
        "//v1//models",
        "/V1/Models",
        "/v1/chat/completions/models",
        "/MODELS/",
    ],
)
def test_paths_that_are_corrected_need_the_key(protected: RunningServer, path: str) -> None:
    assert raw.request(protected.port, "GET", path).status == 401
    response = raw.request(protected.port, "GET", path, headers={"authorization": "Bearer key"})
    assert (response.status, json.loads(response.body)["object"]) == (200, "list")


def test_limits_apply_to_odd_paths(protected: RunningServer) -> None:
    headers = {"authorization": "Bearer key"}
    for path in ("/chat/completions", "/v1/v1/chat/completions/", "/v1/chat/completions/chat/completions"):
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode()
        assert raw.request(protected.port, "POST", path, body, headers).status == 413
    assert raw.request(protected.port, "GET", "/Health/").status == 200  # needs no key
    assert raw.request(protected.port, "GET", "//").status == 200  # the page
    assert raw.request(protected.port, "GET", "/v2/models", headers=headers).status == 404


def test_errors_for_odd_paths_have_the_format_of_their_api(running: RunningServer) -> None:
    assert post(running, "/messages", messages=[]).json()["type"] == "error"
    assert "type" not in post(running, "/v1//chat/completions/", messages=[]).json()
