"""The one place where errors become responses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_mlx.server.errors import ApiError, api_error
from kimi_mlx.server.http.access_log import RECORD_KEY
from kimi_mlx.server.http.limits import AMBIGUOUS_LENGTH
from kimi_mlx.server.http.sse import ClientGoneError
from kimi_mlx.server.json_response import JsonResponse
from kimi_mlx.server.openai.chat_response import openai_error

LOG = logging.getLogger(__name__)

ErrorFormat = Callable[[ApiError], dict[str, Any]]
"""How an API writes an error."""


class ErrorMiddleware:
    """Turns what is raised behind it into responses.

    Args:
        app: what is behind it.
        shapes: of errors, by the beginning of the path; OpenAI's for all others.
        paths: that there are.
    """

    def __init__(self, app: ASGIApp, shapes: Mapping[str, ErrorFormat], paths: Sequence[str]):
        self._app, self._shapes, self._paths = app, shapes, paths

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
            scope[RECORD_KEY].is_gone = True
        except Exception as error:
            told = self._http_error(error, scope) if isinstance(error, HTTPException) else api_error(error)
            scope[RECORD_KEY].reason = told.message
            if told.code == "internal_error":
                LOG.exception("%s %s has failed", scope["method"], scope["path"])
            if not has_begun:
                await self._response(scope["path"], told)(scope, receive, send)

    def _response(self, path: str, error: ApiError) -> JsonResponse:
        shape = next((shape for start, shape in self._shapes.items() if path.startswith(start)), openai_error)
        headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
        if error.status in (408, 413) or error.code == AMBIGUOUS_LENGTH:
            headers["connection"] = "close"  # where the next request begins is not known
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        if error.allow is not None:
            headers["allow"] = error.allow
        return JsonResponse(shape(error), error.status, headers)

    def _http_error(self, error: HTTPException, scope: Scope) -> ApiError:
        """The router's errors."""
        if error.status_code == 405:
            allow = (error.headers or {}).get("Allow")
            return ApiError(405, f"this path takes {allow}", "method_not_allowed", allow=allow)
        message = (
            f"there is no path `{scope['path']:.100}`; the base URL of an OpenAI client ends in `/v1`, that of an "
            f"Anthropic client has no path; there are {', '.join(self._paths)}"
        )
        return ApiError(error.status_code, message, "not_found")
