"""All MCP servers of a chat, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kimi_mlx.errors import ToolError
from kimi_mlx.install_command import install_command
from kimi_mlx.tools.config import ServerConfig
from kimi_mlx.tools.declarations import DeclaredTool, declare
from kimi_mlx.tools.results import ToolResult, parse_arguments

if TYPE_CHECKING:
    from kimi_mlx.tools.connection import Connection

CALL_S = 300.0
"""Time limit of a call."""

MAX_PARALLEL_CALLS = 8
"""Maximum number of calls that run at the same time."""

POLL_S = 0.1
CLOSE_S = 10.0
"""Time limit for the end of all servers."""

SDK_LOGGERS = ("mcp", "client", "httpx2", "httpcore2")
"""Loggers of the SDK. Without a handler they would print what servers send to the terminal."""


@dataclass(frozen=True)
class ServerStatus:
    """Status of one server.

    Attributes:
        name: name in the file.
        state: "disabled", "starting", "ready" or "failed".
        title: its own name and version.
        error: reason why it failed, in one or more lines.
        target: its program with arguments, or its URL.
        tools: its tools.
    """

    name: str
    state: str
    title: str
    error: str
    target: str
    tools: tuple[DeclaredTool, ...]


class McpServers:
    """The servers of a chat. Use it as a context manager; all methods may be called from any thread.

    Args:
        configs: servers to start.
        call_s: time limit of a call in seconds.
    """

    def __init__(self, configs: Sequence[ServerConfig], call_s: float = CALL_S):
        self._configs = configs
        self._call_s = call_s
        self._connections: dict[str, Connection] = {}
        self._lock = threading.Lock()
        self._notes: list[str] = []
        self._declared: dict[str, DeclaredTool] = {}
        self._is_changed = True
        self._limit = asyncio.Semaphore(MAX_PARALLEL_CALLS)
        self._loop_created: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run_loop, name="mcp-servers", daemon=True)
        self._started: Future[None] | None = None

    def __enter__(self) -> McpServers:
        """Begin to start all servers at the same time, and return at once."""
        if importlib.util.find_spec("mcp") is None:
            raise ToolError("tools need the package `mcp`", hint=f"run `{install_command('mcp>=2.3')}`")
        for name in SDK_LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(logging.NullHandler())
            logger.propagate = False
        self._thread.start()
        self._loop = self._loop_created.result()
        self._started = self._submit(self._start_all())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all servers."""
        self.close()

    def wait(self, on_wait: Callable[[Sequence[str]], None] = lambda names: None) -> None:
        """Wait until each server is ready or has failed.

        Args:
            on_wait: function called several times a second with the names of the servers that are starting.
        """
        assert self._started is not None
        while True:
            try:
                self._started.result(POLL_S)
                return
            except FutureTimeoutError:
                on_wait(self.starting)

    @property
    def starting(self) -> list[str]:
        """Names of the servers that are starting."""
        return [name for name, connection in self._connections.items() if connection.state == "starting"]

    @property
    def tools(self) -> list[DeclaredTool]:
        """Tools of all servers, as the model sees them."""
        with self._lock:
            is_changed, self._is_changed = self._is_changed, False
            if is_changed:
                offered = [tool for connection in list(self._connections.values()) for tool in connection.tools]
                declared, notes = declare(offered)
                self._declared = {tool.name: tool for tool in declared}
                self._notes += notes
            return list(self._declared.values())

    def take_notes(self) -> list[str]:
        """Return the notes for the user since the last call: a server ended, or changed its tools."""
        with self._lock:
            notes, self._notes = self._notes, []
        return notes

    def status(self) -> list[ServerStatus]:
        """Return the status of each server, in the order of the files."""
        tools = self.tools
        statuses: list[ServerStatus] = []
        for config in self._configs:
            connection = self._connections.get(config.name)
            statuses.append(
                ServerStatus(
                    config.name,
                    connection.state if connection else "starting",
                    connection.title if connection else "",
                    connection.error if connection else "",
                    config.url or " ".join(config.command),
                    tuple(tool for tool in tools if tool.tool.server == config.name),
                )
            )
        return statuses

    def call(self, name: str, arguments: str) -> Future[ToolResult]:
        """Begin a call; its future has the result, also of a failed call. Cancel the future to end the call.

        Args:
            name: name of the tool, as the model writes it.
            arguments: arguments as JSON.
        """
        known = {tool.name: tool for tool in self.tools}
        if name not in known:
            return _refused(f"there is no tool `{name}`; there are: {', '.join(known) or 'none'}")
        try:
            values = parse_arguments(arguments)
        except ValueError as error:
            return _refused(f"the arguments are not a JSON object: {error}")
        return self._submit(self._call(known[name], values))

    def restart(self, name: str | None = None) -> Future[None]:
        """Begin to restart one server, or all of them; the future is done when they are ready or have failed."""
        return self._submit(self._restart(name))

    def close(self) -> None:
        """End all servers and the thread."""
        if not self._thread.is_alive():
            return
        try:
            self._submit(self._stop_all()).result(CLOSE_S)
        except FutureTimeoutError:
            pass  # their guards end them, since this process closes their input when it exits
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)

    def _run_loop(self) -> None:
        try:
            loop = asyncio.new_event_loop()  # in the main thread, Ctrl-C would leave half a loop, which prints errors
        except OSError as error:
            self._loop_created.set_exception(ToolError(f"the MCP servers cannot be started: {error.strerror}"))
            return
        loop.set_exception_handler(lambda loop, context: None)  # its text may come from a server
        asyncio.set_event_loop(loop)
        self._loop_created.set_result(loop)
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    def _submit(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _start_all(self) -> None:
        from kimi_mlx.tools.connection import Connection  # imports the SDK, which takes a second

        self._connections = {config.name: Connection(config, self._on_change) for config in self._configs}
        await asyncio.gather(*(connection.start() for connection in self._connections.values()))

    async def _stop_all(self) -> None:
        await asyncio.gather(*(connection.stop() for connection in self._connections.values()))

    async def _restart(self, name: str | None) -> None:
        connections = [self._connections[name]] if name is not None else list(self._connections.values())
        await asyncio.gather(*(connection.restart() for connection in connections))

    async def _call(self, tool: DeclaredTool, arguments: dict[str, Any]) -> ToolResult:
        async with self._limit:
            try:
                return await self._connections[tool.tool.server].call(tool.tool.name, arguments, self._call_s)
            except ToolError as error:
                return ToolResult(error.message, is_error=True)

    def _on_change(self, note: str) -> None:
        """Declare the tools again when they are next needed, and keep a note for the user."""
        with self._lock:
            self._is_changed = True
            if note:
                self._notes.append(note)


def _refused(reason: str) -> Future[ToolResult]:
    future: Future[ToolResult] = Future()
    future.set_result(ToolResult(reason, is_error=True))
    return future
