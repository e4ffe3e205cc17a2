"""The server's paths, and what stands before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from kimi_mlx.server.anthropic.response import error_body
from kimi_mlx.server.anthropic.routes import anthropic_routes
from kimi_mlx.server.health import health_problem, health_report
from kimi_mlx.server.http.access_log import AccessLog
from kimi_mlx.server.http.context import Context
from kimi_mlx.server.http.errors_middleware import ErrorFormat, ErrorMiddleware
from kimi_mlx.server.http.limits import BodyLimitMiddleware
from kimi_mlx.server.http.security import AuthMiddleware, Security
from kimi_mlx.server.json_response import JsonResponse
from kimi_mlx.server.openai.routes import openai_routes
from kimi_mlx.server.openapi import document
from kimi_mlx.server.responses_routes import responses_routes

APIS: Sequence[Callable[[Context], list[Route]]] = (openai_routes, responses_routes, anthropic_routes)
"""The APIs that are served, each with its paths."""

SHAPES: Mapping[str, ErrorFormat] = {"/v1/messages": error_body}
"""How they write errors, by the beginning of their paths, where it is not as OpenAI does."""


class Cors(CORSMiddleware):
    """Lets named origins ask; all others are refused by what is behind it, in words."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight, or pass on."""
        origin = Headers(scope=scope).get("origin")
        is_named = origin is not None and self.is_allowed_origin(origin)
        await (super().__call__ if is_named else self.app)(scope, receive, send)


def build_app(context: Context, security: Security, max_body_bytes: int, *, log_prompts: bool = False) -> ASGIApp:
    """The application.

    Args:
        context: what answers.
        security: who may ask.
        max_body_bytes: of a request.
        log_prompts: whether the log shows bodies.
    """
    routes = [route for api in APIS for route in api(context)] + _own_routes(context)
    app: ASGIApp = BodyLimitMiddleware(Router(routes, redirect_slashes=False), max_body_bytes)
    app = ErrorMiddleware(AuthMiddleware(app, security), SHAPES, [route.path_format for route in routes])
    if security.origins:
        app = Cors(
            app,
            allow_origins=list(security.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return AccessLog(app, context.service.metrics, routes, log_prompts=log_prompts)


def _own_routes(context: Context) -> list[Route]:
    """Those of no API."""
    service = context.service

    async def health(request: Request) -> Response:
        status = service.status()
        return JsonResponse(health_report(service, status), 503 if health_problem(service, status) else 200)

    async def metrics(request: Request) -> Response:
        status = service.status()
        text = service.metrics.text(status, is_up=health_problem(service, status) is None)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    described = document(context.model_info.names)

    async def openapi(request: Request) -> Response:
        return JsonResponse(described)

    return [Route("/health", health), Route("/metrics", metrics), Route("/openapi.json", openapi)]
