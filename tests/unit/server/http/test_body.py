"""Bodies: JSON as clients really send it, locations of errors, optional fields, and whole numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, get_args

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.server.anthropic.messages_body import MessagesBody
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_FIELDS,
    MAX_STRINGS,
    MAX_VALUES,
    Body,
    parse,
    parse_json,
)
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.openai.chat_request import ChatBody
from kimi_mlx.server.openai.completions import CompletionBody
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.openapi import POST_PATHS, openapi_document

HI = {"messages": [{"role": "user", "content": "hi"}]}
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False))
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@given(value=VALUES, is_ascii=st.booleans(), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-be"]))
def test_any_json_is_read_in_any_encoding(value: Any, is_ascii: bool, encoding: str) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii)
    assert parse_json(text.encode(encoding, "surrogatepass")) == value


@given(text=st.text(st.characters(), max_size=8) | st.text(st.sampled_from('\\"u\ud83d\ude00aD8'), max_size=12))
def test_halves_of_surrogate_pairs_become_replacement_characters(text: str) -> None:
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for data in (
        json.dumps([text]).encode(),
        json.dumps([text]).replace("\\ud8", "\\uD8").encode(),
        json.dumps([text], ensure_ascii=False).encode("utf-8", "surrogatepass"),
        json.dumps([text], ensure_ascii=False).encode("utf-16", "surrogatepass"),
    ):
        assert parse_json(data) == [expected]


def test_an_escaped_backslash_before_a_surrogate_is_text() -> None:
    assert parse_json(rb'["\\ud83d", "\\\ud83d", "\ud83d\ude00"]') == ["\\ud83d", "\\\ufffd", "\U0001f600"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the body is empty; send a JSON object"),
        (b" \n", "the body is empty"),
        (b"\xef\xbb\xbf", "the body is empty"),
        (b"[]", "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
        (b'{"a": }', "the body is not valid JSON: Expecting value at line 1, column 7"),
        (b'{"a": 1', "at line 1, column 8"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": "\xff"}', "the body is not valid UTF-8: byte 7"),
        (b'{"a": NaN}', "`NaN` is not a JSON value; send null"),
        (b'{"a": -Infinity}', "`-Infinity` is not a JSON value"),
        (b'{"a": 1e999}', "the number `1e999` is too large"),
        (b'{"a": %s}' % (b"9" * 5000), f"has more than {MAX_DIGITS} digits"),
        (b'{"a": %s}' % nested(MAX_DEPTH), f"nested deeper than {MAX_DEPTH} levels"),
        (b'{"a": %s}' % nested(40_000), f"nested deeper than {MAX_DEPTH} levels"),
        (b'{"a": %s}' % nested(100_000), "more than 50,000 lists and objects"),
        (b'{"a": [%s]}' % b",".join([b"[]"] * MAX_CONTAINERS), "more than 50,000 lists and objects"),
    ],
)
def test_errors_of_json(data: bytes, message: str) -> None:
    with pytest.raises(ApiError) as error:
        parse(ChatBody, data)
    assert error.value.status == 400
    assert message in error.value.message


@pytest.mark.parametrize(
    ("item", "count", "name"),
    [
        ("1", 3_000_000, "values"),
        ("[ ]", 3_000_000, "lists and objects"),
        ("{ }", 3_000_000, "lists and objects"),
        (r'"\\"', 3_000_000, "strings"),
        ('{"a":1,"b":2,"c":3,"d":4,"e":5,"f":6,"g":7}', 49_000, "fields"),
    ],
    ids=["ids", "lists", "objects", "strings", "fields"],
)
def test_bodies_with_millions_of_values_are_refused_before_they_are_parsed(item: str, count: int, name: str) -> None:
    data = b'{"messages": [%s]}' % ",".join([item] * count).encode()
    started = time.process_time()
    with pytest.raises(ApiError, match=rf"the body has more than [\d,]+ {name}; send less"):
        parse_json(data)
    assert time.process_time() - started < 2


@pytest.mark.slow
def test_bodies_at_the_limits_are_parsed() -> None:
    assert len(parse_json(b"[%s]" % b",".join([b"1"] * MAX_VALUES))) == MAX_VALUES
    assert len(parse_json(b"[%s]" % b",".join([b"{}"] * (MAX_CONTAINERS - 1)))) == MAX_CONTAINERS - 1
    assert len(parse_json(b"[%s]" % b",".join([rb'"\\\""'] * MAX_STRINGS))) == MAX_STRINGS
    assert len(parse_json(json.dumps(dict.fromkeys(map(str, range(MAX_FIELDS)))).encode())) == MAX_FIELDS
    text = '[{,:"\\' * 1_000_000  # what is in a string does not count
    assert parse_json(json.dumps([text]).encode()) == [text]


@pytest.mark.parametrize("name", ["functions", "function_call"])
def test_deprecated_fields_may_be_null(name: str) -> None:
    parse(ChatBody, json.dumps(HI | {name: None}).encode())
    with pytest.raises(ApiError, match="use `tools` and `tool_choice`"):
        parse(ChatBody, json.dumps(HI | {name: []}).encode())


def test_the_last_of_two_fields_with_one_name_counts() -> None:
    assert parse(ChatBody, b'{"max_tokens": 1, "messages": [{"role": "user"}], "max_tokens": 2}').max_tokens == 2


@pytest.mark.parametrize(
    "make_body",
    [
        lambda: json.dumps({"messages": [0] * 1_000_000}).encode(),
        lambda: json.dumps({"messages": HI["messages"] * 900_000}).encode(),
        lambda: json.dumps({"messages": [{"role": "user", "content": 5}] * 45_000}).encode(),
        lambda: b'{"messages": ' + nested(1_000_000) + b"}",
    ],
)
@pytest.mark.slow
def test_hostile_bodies_are_refused_quickly(make_body: Callable[[], bytes]) -> None:
    body = make_body()
    started = time.process_time()
    with pytest.raises(ApiError):
        parse(ChatBody, body)
    assert time.process_time() - started < 3  # seconds on a slow machine; without bounds it was 20


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (ChatBody, {"messages": [{"role": "user", "content": 5}]}, "`messages[0].content`: must be a string or a list"),
        (ChatBody, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
         "`messages[0].content[0].text`: must be a string"),
        (ChatBody, {"messages": [{"role": "user", "content": [{}]}]},
         "`messages[0].content[0].type`: required field is missing"),
        (ChatBody, {"messages": [{"role": "bot"}]},
         "`messages[0].role`: must be 'system', 'developer', 'user', 'assistant' or 'tool'"),
        (ChatBody, {"messages": [5]}, "`messages[0]`: must be an object"),
        (ChatBody, {"messages": []}, "`messages`: has 0 items, but at least 1 are required"),
        (ChatBody, HI | {"stop": 5}, "`stop`: must be a string or a list"),
        (ChatBody, HI | {"stop": ["a", 5]}, "`stop[1]`: must be a string"),
        (ChatBody, HI | {"tool_choice": 5}, "`tool_choice`: must be 'auto', 'none' or 'required' or an object"),
        (ChatBody, HI | {"tool_choice": {"function": {}}}, "`tool_choice.function.name`: required field is missing"),
        (ChatBody, HI | {"logit_bias": {"a": 1}}, "`logit_bias.a`: the name must be a token id of 1 to 9 digits"),
        (CompletionBody, {"prompt": []}, "`prompt`: has 0 items, but 1 to 64 are allowed"),
        (CompletionBody, {"prompt": [{}] * 65}, "`prompt`: has 65 items, but 1 to 64 are allowed"),
        (CompletionBody, {"prompt": ["a", 5]}, "`prompt[1]`: must be a string"),
        (CompletionBody, {"prompt": {}}, "`prompt`: must be a string or a list"),
        (CompletionBody, {"prompt": [1, -1]}, "`prompt[1]`: is -1, but must be at least 0"),
        (CompletionBody, {"prompt": [[1], []]}, "`prompt[1]`: has 0 items, but at least 1 are required"),
        (MessagesBody, HI | {"system": [{"type": "text"}]}, "`system[0].text`: required field is missing"),
        (MessagesBody, {"messages": [{"role": "user", "content": [{"type": "text", "text": {}}]}]},
         "`messages[0].content[0].text`: must be a string"),
        (MessagesBody, {"messages": [{"role": "user", "content": [{"type": "tool_use", "tool_use": 1, "id": "x"}]}]},
         "`messages[0].content[0].name`: required field is missing"),
        (ResponsesBody, {"input": [{"type": "message", "message": 1, "role": "user", "content": 5}]},
         "`input[0].content`: must be a string or a list"),
        (ResponsesBody, {"input": 5}, "`input`: must be a string or a list"),
        (ResponsesBody, {"input": "hi", "tool_choice": {"type": 4}}, "`tool_choice.type`: must be a string"),
    ],
)  # fmt: skip
def test_errors_name_a_path_in_the_body(model: type[Body], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as error:
        parse(model, json.dumps(fields).encode())
    assert error.value.message.startswith(message)
    assert error.value.param == message.split("`")[1]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *((ChatBody, name) for name in ("max_tokens", "max_completion_tokens", "n", "seed", "top_k", "top_logprobs")),
        *((CompletionBody, name) for name in ("max_tokens", "n", "logprobs", "best_of")),
        *((MessagesBody, name) for name in ("max_tokens", "top_k")),
        *((ResponsesBody, name) for name in ("max_output_tokens", "top_logprobs")),
    ],
)
def test_whole_numbers_may_be_floats(model: type[Body], name: str) -> None:
    required = HI | {"prompt": "hi"} if model is not ResponsesBody else {"input": "hi"}
    body = parse(model, json.dumps(required | {name: 4.0}).encode())
    assert getattr(body, name) == 4
    assert type(getattr(body, name)) is int
    for value in (4.5, "4", True, 1e300):
        with pytest.raises(ApiError, match=f"`{name}`: .*must be "):
            parse(model, json.dumps(required | {name: value}).encode())


def test_token_ids_may_be_floats() -> None:
    assert parse(CompletionBody, b'{"prompt": [1.0, 2]}').prompt == [1, 2]
    assert parse(CompletionBody, b'{"prompt": [[1.0, 2], [3]]}').prompt == [[1, 2], [3]]
    with pytest.raises(ApiError, match=r"`prompt\[1\]`: must be an integer"):
        parse(CompletionBody, b'{"prompt": [1, 2.5]}')


def bodies_in(model: type[Body]) -> set[type[Body]]:
    """Return a body model and all models in its fields."""
    found, todo = set[type[Body]](), [model]
    while todo:
        if (part := todo.pop()) in found:
            continue
        found.add(part)
        annotations: list[Any] = [field.annotation for field in part.model_fields.values()]
        while annotations:
            annotation = annotations.pop()
            annotations += get_args(annotation)
            if isinstance(annotation, type) and issubclass(annotation, Body):
                todo.append(annotation)
    return found


@pytest.mark.parametrize("path", POST_PATHS)
def test_null_means_not_given_for_every_optional_field(path: str) -> None:
    for model in bodies_in(POST_PATHS[path][0]):
        for name, field in model.model_fields.items():
            if not field.is_required():
                assert field.default is None, (model, name)
                adapter = pydantic.TypeAdapter(Any if field.annotation is None else field.annotation)
                assert adapter.validate_python(None) is None, (model, name)


@pytest.mark.parametrize(
    ("schema", "types"),
    [("ContentPart", ("text", "image_url", "video_url")), ("ItemPart", ("input_text", "input_image"))],
)
def test_the_openapi_document_names_the_types_of_parts(schema: str, types: tuple[str, ...]) -> None:
    document = openapi_document(ModelInfo("kimi-mini", (), 1000, 0))
    description = document["components"]["schemas"][schema]["properties"]["type"]["description"]
    assert all(f"`{name}`" in description for name in types)


def test_the_openapi_document_allows_null_for_every_optional_field() -> None:
    document = openapi_document(ModelInfo("kimi-mini", (), 1000, 0))
    schemas = document["components"]["schemas"]
    for title, schema in schemas.items():
        for name, field in schema.get("properties", {}).items():
            if title != "Error" and name not in schema.get("required", ()):
                is_any = not field.keys() & {"type", "anyOf", "enum", "$ref", "allOf"}
                allows_null = {"type": "null"} in field.get("anyOf", ()) or None in field.get("enum", ())
                assert is_any or allows_null, (title, name, field)
