"""The server's own description: OpenAPI 3.1, made from the bodies that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from kimi_mlx.server.anthropic.request import CountBody, MessagesBody
from kimi_mlx.server.http.body import Body
from kimi_mlx.server.openai.chat_request import ChatBody
from kimi_mlx.server.openai.completions import CompletionBody
from kimi_mlx.server.openai.responses_request import ResponsesBody
from kimi_mlx.version import __version__

BODIES: dict[str, tuple[type[Body], str]] = {
    "/v1/chat/completions": (ChatBody, "Answer a conversation"),
    "/v1/completions": (CompletionBody, "Continue plain text"),
    "/v1/responses": (ResponsesBody, "Answer a conversation, in items"),
    "/v1/messages": (MessagesBody, "Answer a conversation, as Anthropic's API does"),
    "/v1/messages/count_tokens": (CountBody, "Count the tokens of a conversation"),
}
"""What is read by POST, and what it is for."""

READS = {
    "/v1/models": "The model",
    "/v1/models/{name}": "The model, by one of its names",
    "/health": "Whether the server can answer",
    "/metrics": "Figures for Prometheus",
    "/openapi.json": "This document",
}
"""What is read by GET."""

ERRORS = {
    "400": "The request cannot be served",
    "401": "No key, or a wrong one",
    "403": "A foreign host or origin",
    "404": "No such model",
    "408": "The body did not come",
    "413": "The body is too large",
    "429": "Too many are waiting",
    "500": "A mistake of the server",
    "503": "The engine is not up",
}


def document(model_names: Sequence[str]) -> dict[str, Any]:
    """The document.

    Args:
        model_names: that the model may be asked for by.
    """
    kinds = [kind for kind, _ in BODIES.values()]
    names, schemas = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    definitions: dict[str, Any] = schemas.get("$defs", {})
    for kind in kinds:
        definitions[kind.__name__]["properties"]["model"] = {"enum": [*model_names, None]}
    posts = {path: {"post": _post(title, names[kind, "validation"]["$ref"])} for path, (kind, title) in BODIES.items()}
    gets = {path: {"get": _get(path, title)} for path, title in READS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "kimi-mlx", "version": __version__},
        "paths": posts | gets,
        "components": {
            "schemas": definitions | {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _post(title: str, ref: str) -> dict[str, Any]:
    answer = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
    return {
        "summary": title,
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": ref}}}},
        "responses": {"200": {"description": "The answer", "content": answer}} | _errors(),
    }


def _get(path: str, title: str) -> dict[str, Any]:
    kind = "text/plain" if path == "/metrics" else "application/json"
    answer = {kind: {"schema": {"type": "string" if kind == "text/plain" else "object"}}}
    operation: dict[str, Any] = {
        "summary": title,
        "responses": {"200": {"description": title, "content": answer}} | _errors(),
    }
    if "{name}" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if path == "/health":
        content = {"application/json": {"schema": {"type": "object"}}}
        operation["responses"]["503"] = {"description": "It cannot, and why", "content": content}
    return operation


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": content} for status, text in ERRORS.items()}


ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
