"""Middleware that turns errors into responses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_mlx.server.errors import ApiError, api_error
from kimi_mlx.server.http.access_log import RECORD_KEY
from kimi_mlx.server.http.body import JsonResponse
from kimi_mlx.server.http.content_encoding import INVALID_ENCODING
from kimi_mlx.server.http.limits import AMBIGUOUS_LENGTH
from kimi_mlx.server.http.sse import ClientDisconnectedError

LOG = logging.getLogger(__name__)

UNKNOWN_PATH = "not_found"
"""Error code of an unknown path."""

ErrorFormat = Callable[[ApiError], dict[str, Any]]
"""Returns the body of an API's error response."""


class ErrorMiddleware:
    """Turns every exception into an error response of the API that was called.

    Args:
        app: wrapped application.
        formats: error formats by path prefix.
        default_format: error format of all other paths.
        paths: paths of all routes, for the message of a 404.
    """

    def __init__(
        self, app: ASGIApp, formats: Mapping[str, ErrorFormat], default_format: ErrorFormat, paths: Sequence[str]
    ):
        self._app, self._formats, self._default_format, self._paths = app, formats, default_format, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; if that fails, send an error response."""
        has_started = False

        async def watching_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        scope["app"] = self  # makes starlette's router raise its errors instead of answering them
        try:
            await self._app(scope, receive, watching_send)
        except (ClientDisconnectedError, ClientDisconnect):
            scope[RECORD_KEY].has_disconnected = True
        except Exception as exception:
            is_http = isinstance(exception, HTTPException)
            error = self._routing_error(exception, scope) if is_http else api_error(exception)
            scope[RECORD_KEY].reason = "unknown path" if error.code == UNKNOWN_PATH else error.log_text
            if error.code == "internal_error":
                LOG.exception("%s %s failed", scope["method"], scope["path"])
            if not has_started:
                await self._response(scope["path"], error)(scope, receive, send)

    def _response(self, path: str, error: ApiError) -> JsonResponse:
        prefixed = (form for prefix, form in self._formats.items() if path.startswith(prefix))
        error_format = next(prefixed, self._default_format)
        headers = dict(error.headers)
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        if error.status in (408, 413, 415) or error.code in (AMBIGUOUS_LENGTH, INVALID_ENCODING):
            headers["connection"] = "close"  # the beginning of the next request is unknown
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JsonResponse(error_format(error), error.status, headers)

    def _routing_error(self, error: HTTPException, scope: Scope) -> ApiError:
        """Return the error for an unknown path or method."""
        if error.status_code == 405:
            allow = (error.headers or {}).get("Allow", "")
            return ApiError(405, f"this path accepts {allow}", "method_not_allowed", headers=(("allow", allow),))
        message = (
            f"there is no path `{scope['path']:.100}`; the base URL of an OpenAI client ends in `/v1`, that of an "
            f"Anthropic client has no path; available: {', '.join(self._paths)}"
        )
        return ApiError(error.status_code, message, UNKNOWN_PATH)
