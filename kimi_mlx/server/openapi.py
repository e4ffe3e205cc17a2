"""The OpenAPI 3.1 document of the server, generated from its request bodies."""

from __future__ import annotations

import re
from typing import Any

from pydantic.json_schema import models_json_schema

from kimi_mlx.server.anthropic.messages_body import CountBody, MessagesBody
from kimi_mlx.server.cluster import cluster_schema
from kimi_mlx.server.http.body import Body
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.openai.chat_request import ChatBody
from kimi_mlx.server.openai.completions import CompletionBody
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.openai.tokenize import DetokenizeBody, TokenizeBody
from kimi_mlx.version import __version__

PATH_PARAMETER = re.compile(r"\{(\w+)\}")

SCHEMA_REF = "#/components/schemas/{model}"
"""Form of references to schemas."""

POST_PATHS: dict[str, tuple[type[Body], str]] = {
    "/v1/chat/completions": (ChatBody, "Answer a conversation"),
    "/v1/chat/completions/input_tokens": (ChatBody, "Count the tokens of a conversation's prompt"),
    "/v1/completions": (CompletionBody, "Continue plain text"),
    "/v1/responses": (ResponsesBody, "Answer a conversation of the Responses API"),
    "/v1/responses/input_tokens": (ResponsesBody, "Count the tokens of the prompt of a response"),
    "/v1/responses/compact": (ResponsesBody, "Summarize a conversation of the Responses API"),
    "/v1/messages": (MessagesBody, "Answer a conversation of Anthropic's Messages API"),
    "/v1/messages/count_tokens": (CountBody, "Count the tokens of a conversation"),
    "/tokenize": (TokenizeBody, "Return the token ids of a text, or of the prompt of a conversation"),
    "/detokenize": (DetokenizeBody, "Return the text of token ids"),
}
"""POST paths, each with the model of its body and a summary."""

CANCEL_PATH = "/v1/responses/{id}/cancel"
"""POST path without a body."""

DELETE_PATHS = {"/v1/responses/{id}": "Delete a response from memory"}
"""DELETE paths, each with a summary."""

GET_PATHS = {
    "/v1/models": "The model",
    "/v1/models/{name}": "The model, under any of its names",
    "/tokenizer_info": "Configuration of the tokenizer, with the chat template",
    "/v1/responses/{id}": "A response that is in progress or kept in memory",
    "/v1/responses/{id}/input_items": "The items from which a response was generated",
    "/v1/cluster": "Status of the model: ranks, memory, queue, answers in progress, restarts",
    "/v1/cluster/events": "The same status as server-sent events, whenever it changes",
    "/health": "Health of the server",
    "/metrics": "Prometheus metrics",
    "/openapi.json": "This document",
}
"""GET paths, each with a summary."""

MEDIA_TYPES = {"/metrics": "text/plain", "/v1/cluster/events": "text/event-stream"}
"""Media types of responses that are not JSON."""

ERRORS = {
    "400": "The request cannot be served",
    "401": "The API key is missing or wrong",
    "403": "The host or origin is not allowed",
    "404": "The model is not served here",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The content encoding is not supported",
    "429": "The queue is full",
    "500": "Internal server error",
    "503": "The engine is not up",
}


def openapi_document(model_info: ModelInfo) -> dict[str, Any]:
    """Return the document of the server of a model."""
    bodies = list(dict.fromkeys(body for body, _ in POST_PATHS.values()))
    names, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=SCHEMA_REF)
    definitions: dict[str, Any] = schemas.get("$defs", {})
    cluster, cluster_parts = cluster_schema(SCHEMA_REF)
    definitions |= cluster_parts | {"ClusterStatus": cluster}
    for body in bodies:
        definitions[body.__name__]["properties"]["model"] = {"enum": [*model_info.names, None]}
    posts = {
        path: {"post": _with_body(title, names[body, "validation"]["$ref"])}
        for path, (body, title) in POST_PATHS.items()
    }
    gets = {path: {"get": _without_body(path, title)} for path, title in GET_PATHS.items()}
    for path, title in DELETE_PATHS.items():
        gets[path]["delete"] = _without_body(path, title)
    posts[CANCEL_PATH] = {"post": _without_body(CANCEL_PATH, "Cancel a response that is in progress")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "kimi-mlx", "version": __version__, "description": _description(model_info)},
        "paths": posts | gets,
        "components": {
            "schemas": definitions | {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _description(model_info: ModelInfo) -> str:
    inputs = ", ".join(["text", *(f"{kind}s" for kind in model_info.media)])
    return f"The model `{model_info.name}`, with {model_info.context_tokens} tokens of context. Input: {inputs}."


def _with_body(title: str, ref: str) -> dict[str, Any]:
    answer = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
    return {
        "summary": title,
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": ref}}}},
        "responses": {"200": {"description": "The answer", "content": answer}} | _errors(),
    }


def _without_body(path: str, title: str) -> dict[str, Any]:
    media_type = MEDIA_TYPES.get(path, "application/json")
    answer = {media_type: {"schema": {"type": "object" if media_type == "application/json" else "string"}}}
    operation: dict[str, Any] = {
        "summary": title,
        "responses": {"200": {"description": title, "content": answer}} | _errors(),
    }
    if path == "/v1/cluster":
        operation["responses"]["200"]["content"] = {
            "application/json": {"schema": {"$ref": SCHEMA_REF.format(model="ClusterStatus")}}
        }
    names = PATH_PARAMETER.findall(path)
    operation["parameters"] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
    ]
    if path == "/health":
        content = {"application/json": {"schema": {"type": "object"}}}
        operation["responses"]["503"] = {"description": "The server cannot answer, with the reason", "content": content}
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
