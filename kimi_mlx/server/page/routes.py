"""Routes of the web page: its files, which need no key, and the rendering of Markdown for it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from pydantic import Field
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_mlx.server.http.body import Body, JsonResponse, parse
from kimi_mlx.server.page.render_queue import RenderQueue

PAGE_PATH, PAGE_FOLDER = "/", "/page/"
RENDER_PATH = f"{PAGE_FOLDER}render"

MAX_TEXT_CHARS = 100_000
"""Maximum length of a text to render."""

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/manifest+json",
}

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src blob:",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types page",
    )
)

HEADERS: Mapping[str, str] = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
}
"""Headers of the page, of its files, of rendered text, and of errors below these paths."""


class RenderBody(Body):
    """Body of POST /page/render."""

    text: str = Field(max_length=MAX_TEXT_CHARS, description="Markdown, from the beginning of a block")
    final: bool = Field(default=False, description="Whether no text will be appended")


@dataclass(frozen=True)
class PageFile:
    """A file of the page.

    Args:
        data: its contents.
        media_type: value of its Content-Type header.
        etag: value of its ETag header.
    """

    data: bytes
    media_type: str
    etag: str

    def response(self, request: Request) -> Response:
        """Return the file, or status 304 if the browser has it."""
        headers = {"etag": self.etag, "cache-control": "no-cache"}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.data, media_type=self.media_type, headers=headers)


class PageHeaders:
    """Adds the headers of the page to all responses below its paths, which may be errors.

    Args:
        app: wrapped application.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        is_page = scope["path"] == PAGE_PATH or scope["path"].startswith(PAGE_FOLDER)
        await self._app(scope, receive, send_with_headers if is_page else send)


def page_routes() -> list[Route]:
    """Return the routes of the page. Its files are read once, now."""
    page_files = load_page_files()

    async def page(request: Request) -> Response:
        return page_files["index.html"].response(request)

    def asset_route(name: str) -> Route:
        async def asset(request: Request) -> Response:
            return page_files[name].response(request)

        return Route(f"{PAGE_FOLDER}{name}", asset)

    render_queue = RenderQueue()

    async def render(request: Request) -> Response:
        body = parse(RenderBody, await request.body())
        client = request.client.host if request.client else ""
        blocks = await render_queue.render(client, body.text, is_final=body.final)
        values = [{"html": block.html, "end": block.end, "finished": block.is_finished} for block in blocks]
        return JsonResponse({"blocks": values}, headers={"cache-control": "no-store"})

    assets = [asset_route(name) for name in page_files if name != "index.html"]
    return [Route(PAGE_PATH, page), *assets, Route(RENDER_PATH, render, methods=["POST"])]


def load_page_files() -> dict[str, PageFile]:
    """Return the files of the page by name."""
    loaded: dict[str, PageFile] = {}
    for file in files("kimi_mlx.server.page").joinpath("static").iterdir():
        suffix = f".{file.name.rpartition('.')[2]}"
        if suffix in MEDIA_TYPES:
            data = file.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            loaded[file.name] = PageFile(data, MEDIA_TYPES[suffix], etag)
    return loaded
