"""The connection to one MCP server: start it, list its tools, call them, restart it after it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

import httpx2
from mcp import MCPError
from mcp.client.client import Client
from mcp.client.session import IncomingMessage
from mcp_types import (
    CONNECTION_CLOSED,
    METHOD_NOT_FOUND,
    REQUEST_TIMEOUT,
    UNSUPPORTED_PROTOCOL_VERSION,
    Implementation,
    ToolListChangedNotification,
)
from pydantic import ValidationError

from kimi_mlx.errors import ToolError
from kimi_mlx.tools.config import ServerConfig
from kimi_mlx.tools.declarations import ServerTool, changes
from kimi_mlx.tools.results import ToolResult, from_mcp, join_lines
from kimi_mlx.tools.stderr_tail import StderrTail, remove_controls
from kimi_mlx.tools.transports import HttpStatus, open_http, open_stdio
from kimi_mlx.units import format_seconds
from kimi_mlx.version import __version__

CLOSED = (CONNECTION_CLOSED, "Connection closed")
"""Error of the SDK for a connection that was closed. Servers use its code for other errors."""

State = Literal["disabled", "starting", "ready", "failed"]

START_S = 60.0
"""Time limit for the start of a server. `npx` and `uvx` may download it first."""

STOP_S = 6.0
"""Time limit for the end of a server: close its input, SIGTERM, SIGKILL."""

END_REPORT_S = 1.0
"""Time to wait for the last lines of a server that has just ended."""

REFRESH_S = 1.0
"""Delay before the tools are listed again after a server has announced a change."""

MAX_TOOL_PAGES = 50
MAX_TOOLS = 1_000
"""Maximum number of tools that are read from a server."""

MAX_ERROR = 500
"""Maximum number of characters of an error that comes from a server."""


class Connection:
    """One server. All methods run in the event loop of the servers.

    Args:
        config: how to reach the server.
        on_change: function called with a note for the user when the server ends or changes its tools.

    Attributes:
        state: state of the server; `ready` once its tools are listed.
        error: reason why it failed.
        tools: its tools; those of the last start if it has ended.
        title: name and version that the server reports; empty if unknown.
    """

    def __init__(self, config: ServerConfig, on_change: Callable[[str], None]):
        self.config = config
        self.state: State = "disabled" if config.is_disabled else "starting"
        self.error = ""
        self.tools: tuple[ServerTool, ...] = ()
        self.title = ""
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self._start_lock = asyncio.Lock()
        self._over = asyncio.Event()
        self._refresh: asyncio.Task[None] | None = None
        self._client: Client | None = None
        self._stderr: StderrTail | None = None
        self._http = HttpStatus()

    async def start(self) -> None:
        """Start the server, or start it again after it has failed; return when it is ready or has failed."""
        async with self._start_lock:
            if self.state in ("ready", "disabled"):
                return
            await self.stop()
            self.state, self.error = "starting", ""
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._run(ready))
            await asyncio.wait(
                {self._task, asyncio.ensure_future(ready)}, timeout=START_S, return_when="FIRST_COMPLETED"
            )
            if not self._task.done() and not ready.done():
                self._fail(f"it did not start within {START_S:.0f} s" + join_lines(self._stderr_lines()))
                await self.stop()

    async def restart(self) -> None:
        """End the server, if it runs, and start it again."""
        if self.state == "disabled":
            return
        await self.stop()
        self.state = "starting"
        await self.start()

    async def stop(self) -> None:
        """End the server; its state does not change."""
        task, self._task = self._task, None
        if task is None or task.done():
            return
        if self.state == "ready" or self._over.is_set():
            self._over.set()
            await asyncio.wait({task}, timeout=STOP_S)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=STOP_S)

    async def call(self, name: str, arguments: Mapping[str, Any], limit_s: float) -> ToolResult:
        """Call a tool; start the server first if it has ended.

        Args:
            name: name of the tool on the server.
            arguments: arguments of the call.
            limit_s: time limit of the call in seconds.

        Raises:
            ToolError: there is no result.
        """
        await self.start()
        if self._client is None:
            raise ToolError(f"server `{self.config.name}` is not available: {self.error or self.state}")
        self._http.code = 0
        try:
            return from_mcp(await self._client.call_tool(name, dict(arguments), read_timeout_seconds=limit_s))
        except Exception as error:  # whatever a server makes the SDK raise is an error of this call alone
            raise ToolError(f"server `{self.config.name}`: {await self._describe(error, limit_s)}") from error

    async def _run(self, ready: asyncio.Future[None]) -> None:
        """Connect, list the tools, and keep the connection until it ends or is closed."""
        try:
            try:
                await self._connect("legacy", ready)
            except Exception as error:
                # a server that knows only the protocol without a handshake
                if ready.done() or _code(error) not in (UNSUPPORTED_PROTOCOL_VERSION, METHOD_NOT_FOUND):
                    raise
                await self._connect("auto", ready)
        except Exception as error:  # as in call(): an error of this server alone
            self._fail(await self._describe(error, START_S))
        finally:
            self._client = None

    async def _connect(self, mode: Literal["legacy", "auto"], ready: asyncio.Future[None]) -> None:
        self._over = asyncio.Event()
        async with self._open_transport() as transport:
            client = Client(
                transport,
                mode=mode,
                cache=None,
                client_info=Implementation(name="kimi-mlx", version=__version__),
                read_timeout_seconds=START_S,
                message_handler=self._on_message,
            )
            async with client:
                info = client.server_info
                self.title = remove_controls(f"{info.title or info.name} {info.version}") if info else ""
                self.tools = await self._list(client)
                self.state, self._client = "ready", client
                ready.set_result(None)
                self._on_change("")
                await self._over.wait()
                if self.state == "ready" and self._task is asyncio.current_task():  # nobody has stopped it
                    self._fail(f"it ended{join_lines(self._stderr_lines())}")
                    self._on_change(f"server {self.config.name} ended; it is started again when a tool of it is called")

    @asynccontextmanager
    async def _open_transport(self) -> AsyncGenerator[Any]:
        """Yield the SDK's transport, which is entered by its client."""
        if self.config.url:
            self._stderr = None
            yield open_http(self.config, self._http)
            return
        loop, over = asyncio.get_running_loop(), self._over

        def on_end() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(over.set)

        self._stderr = StderrTail(on_end)
        try:
            yield open_stdio(self.config, self._stderr)
        finally:
            self._stderr.file.close()

    async def _list(self, client: Client) -> tuple[ServerTool, ...]:
        """Return the tools of the server, page by page."""
        if client.server_capabilities.tools is None:
            return ()
        tools: list[ServerTool] = []
        cursor: str | None = None
        for _ in range(MAX_TOOL_PAGES):
            page = await client.list_tools(cursor=cursor)
            tools += [
                ServerTool(self.config.name, tool.name, (tool.description or "").strip(), tool.input_schema)
                for tool in page.tools
            ]
            cursor = page.next_cursor
            if cursor is None or len(tools) >= MAX_TOOLS:
                break
        return tuple({tool.name: tool for tool in tools[:MAX_TOOLS]}.values())

    async def _on_message(self, message: IncomingMessage) -> None:
        """List the tools again after the server has announced a change."""
        is_listing = self._refresh is not None and not self._refresh.done()
        if isinstance(message, ToolListChangedNotification) and self._client is not None and not is_listing:
            self._refresh = asyncio.create_task(self._list_again(self._client))

    async def _list_again(self, client: Client) -> None:
        await asyncio.sleep(REFRESH_S)
        try:
            tools = await self._list(client)
        except Exception as error:  # the tools stay as they were; a server that has ended is noticed elsewhere
            self._on_change(f"server {self.config.name}: cannot list its tools: {_first_line(error)}")
            return
        if marks := changes(self.tools, tools):
            self.tools = tools
            self._on_change(f"server {self.config.name} changed its tools: {marks}")

    def _fail(self, error: str) -> None:
        self.state, self.error, self._client = "failed", error, None
        self._on_change("")

    async def _describe(self, error: Exception, limit_s: float) -> str:
        """Describe an error of the SDK for the user and the model, with the last lines of the server's stderr."""
        cause = _root(error)
        if isinstance(cause, ToolError):
            return cause.message + (f"; {cause.hint}" if cause.hint else "")
        if isinstance(cause, MCPError) and cause.code == REQUEST_TIMEOUT:
            return f"no answer within {format_seconds(limit_s)}" + join_lines(self._stderr_lines())
        if self.config.url:
            return await self._describe_http(cause)
        if _is_closed(cause):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._over.wait(), END_REPORT_S)
            self._over.set()  # also if a child of the server keeps its stderr open
            return "it ended" + join_lines(self._stderr_lines())
        return _first_line(cause)

    async def _describe_http(self, cause: BaseException) -> str:
        """Describe an error of a server over HTTP. If it has lost the session, the next call opens another one."""
        code = self._http.code
        if code == 404 and self._client is not None:
            self._over.set()
            self._fail("the server has started again and lost the session")
            return f"{self.error}; call again"
        if _is_closed(cause) and self._task is not None:
            await asyncio.wait({self._task}, timeout=END_REPORT_S)
            self._over.set()
            return self.error or "the connection was closed"
        if code in (401, 403):
            return (
                f'{self._http.text}; write "headers": {{"Authorization": "Bearer ${{TOKEN}}"}} '
                "(a login in the browser, OAuth, is not supported)"
            )
        if isinstance(cause, httpx2.ConnectError):
            return f"cannot connect to {self.config.url}: {_first_line(cause)}"
        if code in (404, 405):
            return f"{self._http.text}; check the URL (the older SSE transport is not supported)"
        return self._http.text if code else _first_line(cause)

    def _stderr_lines(self) -> list[str]:
        return self._stderr.lines() if self._stderr is not None else []


def _root(error: BaseException) -> BaseException:
    """Return the first error inside groups of errors, which the SDK's task groups raise."""
    while isinstance(inner := getattr(error, "exceptions", None), tuple) and inner:
        error = inner[0]
    return error


def _code(error: BaseException) -> int | None:
    cause = _root(error)
    return cause.code if isinstance(cause, MCPError) else None


def _is_closed(error: BaseException) -> bool:
    """Return whether an error is that of a closed connection."""
    return isinstance(error, MCPError) and (error.code, error.message) == CLOSED


def _first_line(error: BaseException) -> str:
    """Describe an error in one line of bounded length."""
    cause = _root(error)
    if isinstance(cause, ValidationError):
        first = cause.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return remove_controls(f"its answer is not valid: {place}: {first['msg']}")[:MAX_ERROR]
    return (" ".join(remove_controls(str(cause)).split()) or type(cause).__name__)[:MAX_ERROR]
