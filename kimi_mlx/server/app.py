"""The ASGI application: routes of all APIs, and the middleware around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from kimi_mlx.server.anthropic.response import anthropic_error
from kimi_mlx.server.anthropic.routes import anthropic_routes
from kimi_mlx.server.cluster import cluster_status
from kimi_mlx.server.health import health_problem, health_report
from kimi_mlx.server.http.access_log import AccessLog
from kimi_mlx.server.http.body import JsonResponse
from kimi_mlx.server.http.context import Context
from kimi_mlx.server.http.errors_middleware import ErrorFormat, ErrorMiddleware
from kimi_mlx.server.http.limits import BodyLimitMiddleware
from kimi_mlx.server.http.request_paths import PathMiddleware
from kimi_mlx.server.http.security import AuthMiddleware, Security
from kimi_mlx.server.http.sse import STREAM_HEADERS
from kimi_mlx.server.openai.response_fields import openai_error
from kimi_mlx.server.openai.responses_routes import responses_routes
from kimi_mlx.server.openai.routes import openai_routes
from kimi_mlx.server.openapi import openapi_document
from kimi_mlx.server.page.routes import RENDER_PATH, PageHeaders, page_routes
from kimi_mlx.server.status_feed import StatusFeed

APIS: Sequence[Callable[[Context], list[Route]]] = (openai_routes, responses_routes, anthropic_routes)

EVENTS_PATH = "/v1/cluster/events"
"""Path of the status as a stream. Pages open it whenever they become visible, so successful requests are not logged."""

ERROR_FORMATS: Mapping[str, ErrorFormat] = {"/v1/messages": anthropic_error}
"""Error formats by path prefix; all other paths use OpenAI's."""


class CorsMiddleware(CORSMiddleware):
    """Handles requests from allowed origins; AuthMiddleware refuses all others, with an error that names the option."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight request, or pass the request on."""
        origin = Headers(scope=scope).get("origin")
        is_allowed = origin is not None and self.is_allowed_origin(origin)
        await (super().__call__ if is_allowed else self.app)(scope, receive, send)


def build_app(
    context: Context, security: Security, max_body_bytes: int, *, log_prompts: bool = False, has_page: bool = True
) -> ASGIApp:
    """Return the application.

    Args:
        context: service and model info.
        security: access rules.
        max_body_bytes: size limit of a request's body.
        log_prompts: whether request bodies are logged.
        has_page: whether the web page is served.
    """
    routes = [route for api in APIS for route in api(context)] + _status_routes(context)
    paths = list(dict.fromkeys(route.path_format for route in routes))
    page = page_routes() if has_page else []
    app: ASGIApp = BodyLimitMiddleware(Router([*routes, *page], redirect_slashes=False), max_body_bytes)
    public_paths = {"/health", *(route.path for route in page if route.path != RENDER_PATH)}
    app = ErrorMiddleware(AuthMiddleware(app, security, public_paths), ERROR_FORMATS, openai_error, paths)
    if has_page:
        app = PageHeaders(app)
    if security.origins:
        app = CorsMiddleware(
            app,
            allow_origins=list(security.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["request-id", "x-request-id", "retry-after"],
        )
    unlogged = {*(route.path for route in page), EVENTS_PATH}
    app = AccessLog(app, context.service.metrics, [*routes, *page], unlogged, log_prompts=log_prompts)
    return PathMiddleware(app, [*routes, *page])


def _status_routes(context: Context) -> list[Route]:
    """Return the routes that belong to no API: health, metrics, the status and the OpenAPI document."""
    service = context.service

    async def health(request: Request) -> Response:
        status = service.status()
        return JsonResponse(health_report(service, status), 503 if health_problem(service, status) else 200)

    async def metrics(request: Request) -> Response:
        status = service.status()
        text = service.metrics.render(status, is_up=health_problem(service, status) is None)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def cluster(request: Request) -> Response:
        return JsonResponse(cluster_status(service, context.model_info, context.deployment).to_dict())

    feed = StatusFeed(
        lambda: cluster_status(service, context.model_info, context.deployment).to_dict(), lambda: service.is_closing
    )

    async def cluster_events(request: Request) -> Response:
        feed.check_capacity()
        return StreamingResponse(feed.events(), media_type="text/event-stream", headers=STREAM_HEADERS)

    document = openapi_document(context.model_info)

    async def openapi(request: Request) -> Response:
        return JsonResponse(document)

    return [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/cluster", cluster),
        Route(EVENTS_PATH, cluster_events),
        Route("/openapi.json", openapi),
    ]
