"""Paths of requests that are corrected to those of routes."""

from __future__ import annotations

import time

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kimi_mlx.server.http.request_paths import PathMiddleware


async def _unused(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError


async def _endpoint(request: Request) -> Response:
    return Response()


ROUTES = [
    *(Route(f"/v1/{path}", _endpoint, methods=["POST"]) for path in ("chat/completions", "completions", "messages")),
    Route("/v1/chat/completions/input_tokens", _endpoint, methods=["POST"]),
    Route("/v1/models", _endpoint),
    Route("/v1/models/{name:path}", _endpoint),
    Route("/health", _endpoint),
    Route("/page/app.js", _endpoint),
    Route("/", _endpoint),
]
MIDDLEWARE = PathMiddleware(_unused, ROUTES)


@pytest.mark.parametrize(
    ("path", "intended"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("//v1///chat//completions//", "/v1/chat/completions"),
        ("/V1/Chat/Completions", "/v1/chat/completions"),
        ("/v1/chat/completions/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/input_tokens", "/v1/chat/completions/input_tokens"),
        ("/v1/chat/completions/chat/completions/input_tokens", "/v1/chat/completions/input_tokens"),
        ("/v1/messages/v1/messages", "/v1/messages"),
        ("/v1/messages/models", "/v1/models"),
        ("/v1/models/moonshotai/Kimi-K2", "/v1/models/moonshotai/Kimi-K2"),
        ("/models/moonshotai/Kimi-K2/", "/v1/models/moonshotai/Kimi-K2"),
        ("/v1/MODELS/Kimi", "/v1/models/Kimi"),
        ("/v1/health", "/health"),
        ("/HEALTH", "/health"),
        ("/page//app.js", "/page/app.js"),
        ("//", "/"),
        ("/", "/"),
    ],
)
def test_the_intended_route(path: str, intended: str) -> None:
    assert MIDDLEWARE.route_path(path) == intended


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/", "/v1/v1", "/v2/models", "/api/chat", "/xyz/v1/models", "/v1/messages/nothing", "*", ""]
)
def test_other_paths_are_unchanged(path: str) -> None:
    assert MIDDLEWARE.route_path(path) == (path or "/")


def test_a_hostile_path_costs_little() -> None:
    started = time.process_time()
    MIDDLEWARE.route_path("/chat/completions" * 4_000)
    MIDDLEWARE.route_path("/" * 65_000 + "v1" + "/v1" * 20_000)
    assert time.process_time() - started < 1
