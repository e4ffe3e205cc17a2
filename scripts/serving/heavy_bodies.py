"""Request bodies that cost a server much work: most of them are sent by broken or hostile clients."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
COUNT_TOKENS = "/v1/messages/count_tokens"
HI = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class HeavyRequest:
    """A request that is sent next to a running stream.

    Args:
        name: name in the report.
        path: path of the request.
        body: body of the request.
        count: number of copies that are sent at once.
    """

    name: str
    path: str
    body: bytes
    count: int = 1


def heavy_requests() -> list[HeavyRequest]:
    """Return all requests, made one after the other because some are large."""
    return [
        _request("a short request", {"messages": HI, "max_tokens": 1}),
        _request("a million zeros as messages", {"messages": [0] * 1_000_000}),
        _request("30 MB of small messages", {"messages": HI * 900_000}),
        _request("100,000 items", {"input": HI * 100_000}, RESPONSES),
        _request("100,000 prompts", {"prompt": ["hi"] * 100_000}, COMPLETIONS),
        _request("a prompt of 20,000 tokens, without tools", _with_text(52_000)),
        _request("128 strict tools", _with_tools(128, strict=True)),
        _request("required, 300 tools", {**_with_tools(300), "tool_choice": "required"}),
        _request("tool schema nested 180 deep", _with_schema(_nested(180))),
        _request("strict tool schema nested 180 deep", _with_schema(_nested(180), strict=True)),
        _request("tool schema nested 40 deep, required", {**_with_schema(_nested(40)), "tool_choice": "required"}),
        _request("anyOf of 1 MB", _with_schema(_any_of(17_000))),
        _request("strict anyOf of 1 MB", _with_schema(_any_of(17_000), strict=True)),
        _request("response_format with 1,000 properties", _with_response_format(1_000)),
        _long_integer(5_000),
        _request("a text of 1 MB", _with_text(1_000_000)),
        _request("a text of 30 MB", _with_text(30_000_000)),
        _request("40 texts of 400 kB to count", _with_text(400_000), COUNT_TOKENS, count=40),
        _request("40 texts of 30 kB to count", _with_text(30_000), COUNT_TOKENS, count=40),
        _request("40 texts of 7 kB to count", _with_text(7_000), COUNT_TOKENS, count=40),
    ]


def _request(name: str, body: Mapping[str, Any], path: str = CHAT, count: int = 1) -> HeavyRequest:
    return HeavyRequest(name, path, json.dumps(body).encode(), count)


def _with_tools(count: int, **fields: Any) -> dict[str, Any]:
    functions = [
        {"name": f"tool_{i}", "description": f"Tool {i}", "parameters": _schema(i), **fields} for i in range(count)
    ]
    tools = [{"type": "function", "function": function} for function in functions]
    return {"messages": HI, "tools": tools, "max_tokens": 1}


def _schema(number: int) -> dict[str, Any]:
    """Return a schema as coding agents have them: texts, numbers, a choice, a list and an object."""
    properties: dict[str, Any] = {
        "path": {"type": "string", "description": "Path of the file"},
        "limit": {"type": "integer", "minimum": 0, "maximum": 1000 + number},
        "mode": {"type": "string", "enum": ["read", "write", f"mode_{number}"]},
        "lines": {"type": "array", "items": {"type": "integer"}, "maxItems": 8},
        "options": {
            "type": "object",
            "properties": {"deep": {"type": "boolean"}, "pattern": {"type": "string"}},
            "required": ["deep"],
            "additionalProperties": False,
        },
    }
    return {"type": "object", "properties": properties, "required": ["path"], "additionalProperties": False}


def _long_integer(digits: int) -> HeavyRequest:
    """Return a request with a long integer in a schema, which Python does not write as JSON."""
    request = _request("integer of 5,000 digits", _with_schema({"properties": {"n": {"maximum": 123456789}}}))
    return replace(request, body=request.body.replace(b"123456789", b"9" * digits))


def _with_schema(schema: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    function = {"name": "tool", "parameters": {"type": "object", **schema}, **fields}
    return {"messages": HI, "tools": [{"type": "function", "function": function}], "max_tokens": 1}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for level in range(depth):
        properties = {f"p{level}": schema, "other": {"type": "integer"}}
        schema = {"type": "object", "properties": properties, "required": [f"p{level}"]}
    return schema


def _any_of(count: int) -> dict[str, Any]:
    return {
        "properties": {"value": {"anyOf": [{"type": "string", "const": f"value number {i}"} for i in range(count)]}}
    }


def _with_response_format(count: int) -> dict[str, Any]:
    properties = {f"property_{i}": {"type": "string"} for i in range(count)}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return {"messages": HI, "response_format": response_format, "max_tokens": 1}


def _with_text(size: int) -> dict[str, Any]:
    words = "The engine reads a chunk of the prompt, then one token of each answer; nobody waits for long. "
    return {"messages": [{"role": "user", "content": (words * (size // len(words) + 1))[:size]}], "max_tokens": 1}
