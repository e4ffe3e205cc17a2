"""The one place where errors become responses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_mlx.server.errors import ApiError, api_error
from kimi_mlx.server.journal import RECORD
from kimi_mlx.server.json_response import JsonResponse
from kimi_mlx.server.openai_chat import openai_error
from kimi_mlx.server.sse import ClientGoneError

LOG = logging.getLogger(__name__)

ErrorShape = Callable[[ApiError], dict[str, Any]]
"""How an API writes an error."""


class Boundary:
    """Turns what is raised behind it into responses.

    Args:
        app: what is behind it.
        shapes: of errors, by the beginning of the path; OpenAI's for all others.
    """

    def __init__(self, app: ASGIApp, shapes: Mapping[str, ErrorShape]):
        self._app, self._shapes = app, shapes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        scope["app"] = self  # by which starlette's router knows that it may raise
        try:
            await self._app(scope, receive, watched)
        except (ClientGoneError, ClientDisconnect):
            scope[RECORD].is_gone = True
        except Exception as error:
            told = _http_error(error) if isinstance(error, HTTPException) else api_error(error)
            if told.status == 500:
                LOG.exception("%s %s has failed", scope["method"], scope["path"])
            if not has_begun:
                await self._response(scope["path"], told)(scope, receive, send)

    def _response(self, path: str, error: ApiError) -> JsonResponse:
        shape = next((shape for start, shape in self._shapes.items() if path.startswith(start)), openai_error)
        headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
        if error.status in (408, 413):
            headers["connection"] = "close"  # the rest of the body is not read
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        if error.allow is not None:
            headers["allow"] = error.allow
        return JsonResponse(shape(error), error.status, headers)


def _http_error(error: HTTPException) -> ApiError:
    """The router's errors."""
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow")
        return ApiError(405, f"this path takes {allow}", "method_not_allowed", allow=allow)
    return ApiError(error.status_code, "there is no such path", "not_found")
