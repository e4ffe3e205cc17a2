"""Connections to MCP servers by the SDK's two transports, with limits on what a server may send."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
from mcp.client.stdio import StdioServerParameters, get_default_environment, stdio_client
from mcp.client.streamable_http import streamable_http_client

from kimi_mlx.errors import ToolError
from kimi_mlx.tools import guard
from kimi_mlx.tools.config import ServerConfig
from kimi_mlx.tools.guard import MAX_MESSAGE_BYTES
from kimi_mlx.tools.stderr_tail import StderrTail

if TYPE_CHECKING:
    from mcp.client._transport import TransportStreams

CONNECT_S = 15.0
"""Time limit for opening an HTTP connection."""

MAX_EVENT_BYTES_PER_S = 500_000
"""Rate at which the stream of a server's own messages over HTTP is read."""


@asynccontextmanager
async def open_stdio(config: ServerConfig, stderr: StderrTail) -> AsyncGenerator[TransportStreams]:
    """Start a server as a child of a guard process, in a process group of its own.

    It inherits HOME, LOGNAME, PATH, SHELL, TERM and USER, and the variables of its configuration, as the SDK decides:
    no keys and tokens of other programs.

    Raises:
        ToolError: the program or the working directory does not exist.
    """
    _check_program(config)
    parameters = StdioServerParameters(
        command=sys.executable,
        args=["-I", "-S", guard.__file__, *config.command],
        env=dict(config.env),
        cwd=config.cwd,
        encoding_error_handler="replace",
    )
    async with stdio_client(parameters, errlog=stderr.file) as streams:
        stderr.file.close()
        yield streams


def _check_program(config: ServerConfig) -> None:
    """Check that the working directory and the program of a server exist."""
    if config.cwd is not None and not Path(config.cwd).is_dir():
        raise ToolError(f"its working directory `{config.cwd}` is not a folder", hint="correct `cwd`")
    program = config.command[0]
    path = {**get_default_environment(), **config.env}.get("PATH")
    if os.sep in program:
        is_found = os.access(Path(config.cwd or ".", program), os.X_OK)
    else:
        is_found = shutil.which(program, path=path) is not None
    if not is_found:
        hint = f"install it, or write its full path as `command`; try `which {program}`"
        if " " in program:
            hint = "write only the program as `command`, and its arguments as `args`"
        raise ToolError(f"its program `{program}` is not found", hint=hint)


class HttpStatus:
    """Status of the last failed response of a server over HTTP, because the SDK's errors do not name it."""

    def __init__(self) -> None:
        self.code = 0
        self.text = ""

    async def check(self, response: httpx2.Response) -> None:
        """Record the status of a failed response, and limit the size and the rate of what is read."""
        if response.status_code >= 400 and response.request.method == "POST":
            self.code, self.text = response.status_code, f"HTTP {response.status_code} {response.reason_phrase}"
        is_endless = response.request.method == "GET"
        response.stream = _BoundedStream(response.stream, is_endless)  # pyright: ignore[reportArgumentType]


class _BoundedStream(httpx2.AsyncByteStream):
    """A body that ends with an error at MAX_MESSAGE_BYTES, or, if it is endless, is read slowly."""

    def __init__(self, stream: httpx2.AsyncByteStream, is_endless: bool):
        self._stream = stream
        self._is_endless = is_endless

    async def __aiter__(self) -> AsyncIterator[bytes]:
        num_bytes = 0
        async for chunk in self._stream:
            num_bytes += len(chunk)
            if self._is_endless:
                await asyncio.sleep(len(chunk) / MAX_EVENT_BYTES_PER_S)
            elif num_bytes > MAX_MESSAGE_BYTES:
                raise httpx2.StreamError(f"the result has more than {MAX_MESSAGE_BYTES // 2**20} MiB")
            yield chunk

    async def aclose(self) -> None:
        """Close the body."""
        await self._stream.aclose()


@asynccontextmanager
async def open_http(config: ServerConfig, status: HttpStatus) -> AsyncGenerator[TransportStreams]:
    """Connect to a server over streamable HTTP.

    Args:
        config: server.
        status: receives the status of failed responses.
    """
    client = httpx2.AsyncClient(
        headers=dict(config.headers),
        timeout=httpx2.Timeout(CONNECT_S, read=None),  # each request has a limit of its own
        event_hooks={"response": [status.check]},
    )
    async with (
        client,
        streamable_http_client(config.url, http_client=client, max_sse_event_size=MAX_MESSAGE_BYTES) as streams,
    ):
        yield streams
