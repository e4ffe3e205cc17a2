"""Correct the paths of requests from clients whose base URL is set differently than they expect.

People type the base URL of a client with or without `/v1`, with a slash at its end, or with the path of an endpoint.
The clients then send paths such as `/v1/v1/models`, `/chat/completions`, `/v1//models/` and `/v1/messages/v1/messages`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

VERSION = "v1"
"""First part of the paths of all APIs."""


class PathMiddleware:
    """Replaces the path of a request by that of the intended route, before anything else reads it.

    So API keys, limits, metrics and the log treat such a request like any other. Nothing is redirected, because a
    redirect would lose the path of a reverse proxy.

    Args:
        app: wrapped application.
        routes: all routes.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[Route]):
        self._app = app
        by_specificity = sorted(routes, key=lambda route: len(route.param_convertors))
        self._routes = [(route, re.compile(route.path_regex.pattern, re.IGNORECASE)) for route in by_specificity]
        self._endpoints = [
            _parts(route.path) for route in routes if "POST" in (route.methods or ()) and not route.param_convertors
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with its path corrected."""
        if scope["type"] == "http":
            path = self.route_path(scope["path"])
            if path != scope["path"]:
                scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)

    def route_path(self, path: str) -> str:
        """Return the path of the intended route; the path itself if no route fits."""
        candidates = ("/" + "/".join(parts) for parts in self._candidates(_parts(path)))
        found = (route_path for candidate in candidates if (route_path := self._find(candidate)) is not None)
        return next(found, path)

    def _candidates(self, parts: list[str]) -> Iterator[list[str]]:
        """Yield the parts of the paths that may be intended, most likely first."""
        rest = _without_version(parts)
        if not rest and not parts:
            yield []
        elif rest:
            yield [VERSION, *rest]
            yield rest
        for endpoint in self._endpoints:  # the base URL has the path of an endpoint
            names = _without_version(endpoint)
            if _lower(rest[: len(names)]) == names and (after := _without_version(rest[len(names) :])):
                yield [VERSION, *after]

    def _find(self, path: str) -> str | None:
        """Return the path of the first route that a path matches, ignoring case."""
        for route, pattern in self._routes:
            if match := pattern.match(path):
                return route.path_format.format(**match.groupdict())
        return None


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _without_version(parts: list[str]) -> list[str]:
    """Return the parts after any leading `v1`."""
    return next((parts[at:] for at, part in enumerate(parts) if part.lower() != VERSION), list[str]())


def _lower(parts: list[str]) -> list[str]:
    return [part.lower() for part in parts]
