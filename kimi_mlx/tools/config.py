"""Read the file that lists MCP servers: the `mcpServers` JSON of Claude Desktop, Claude Code and Cursor.

Source: https://modelcontextprotocol.io/docs/develop/connect-local-servers, and for `type`, `headers` and
`${VAR:-default}` https://code.claude.com/docs/en/mcp.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from kimi_mlx.errors import ToolConfigError
from kimi_mlx.units import MB, format_bytes

EXAMPLE = '{"mcpServers": {"git": {"command": "uvx", "args": ["mcp-server-git"]}}}'
TYPES: dict[str, Literal["stdio", "http", "sse"]] = {
    "stdio": "stdio",
    "http": "http",
    "streamable-http": "http",
    "streamableHttp": "http",
    "streamable_http": "http",
    "sse": "sse",
}
"""Names of the transports in `type` or `transport`."""

MAX_BYTES = MB
"""Size limit of a file of servers."""

STDIO_KEYS = ("command", "args", "env", "cwd")
HTTP_KEYS = ("url", "headers")
KEYS = (*STDIO_KEYS, *HTTP_KEYS, "type", "transport", "disabled")
SIMILARITY = 0.75
"""Minimum similarity at which an unknown key counts as misspelled."""

VARIABLE = re.compile(r"\$\{(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
"""Reference to a variable of the environment: `${NAME}`, `${env:NAME}` (Cursor), or `${NAME:-default}`."""


@dataclass(frozen=True)
class ServerConfig:
    """How to reach one MCP server.

    Attributes:
        name: name in the file.
        command: program with its arguments; empty for a server with a URL.
        env: variables added to its environment.
        cwd: working directory; None is that of this process.
        url: URL of a server over streamable HTTP; empty for a program.
        headers: HTTP headers of every request.
        is_disabled: True if the file disables it; it is not started.
    """

    name: str
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    cwd: str | None = None
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    is_disabled: bool = False


def read_config(
    paths: Sequence[Path], environment: Mapping[str, str] = os.environ
) -> tuple[list[ServerConfig], list[str]]:
    """Read files that list MCP servers.

    Args:
        paths: JSON files.
        environment: variables that `${NAME}` refers to.

    Returns:
        The servers in the order of the files, and notes for the user about keys that are not used.

    Raises:
        ToolConfigError: a file cannot be read, or a server in it is not described correctly.
    """
    servers: dict[str, ServerConfig] = {}
    notes: list[str] = []
    for path in paths:
        for name, value in _read_servers(path).items():
            if name in servers:
                raise ToolConfigError(
                    f"`{path}`: server `{name}` is also in another file", hint="rename one of the two servers"
                )
            reader = _ServerReader(path, name, environment)
            servers[name] = reader.read(value)
            notes += reader.notes
    return list(servers.values()), notes


def _read_servers(path: Path) -> Mapping[str, Any]:
    """Return the value of `mcpServers`."""
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ToolConfigError(f"`{path}` is not a file", hint=_example(path))
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ToolConfigError(f"`{path}` has more than {format_bytes(MAX_BYTES)}", hint=_example(path))
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ToolConfigError(f"`{path}` cannot be read: {error.strerror}", hint=_example(path)) from error
    except UnicodeDecodeError as error:
        raise ToolConfigError(f"`{path}` is not UTF-8 text", hint=_example(path)) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "JSON has no comments and no comma before a closing bracket"
        raise ToolConfigError(f"`{path}` is not JSON: {error}", hint=hint) from error
    servers = cast("dict[str, Any]", value).get("mcpServers") if isinstance(value, dict) else None
    if not isinstance(servers, dict):
        problem = "`mcpServers` is not an object" if servers is not None else "it has no `mcpServers`"
        raise ToolConfigError(f"`{path}`: {problem}", hint=_hint_without_servers(value))
    return cast("dict[str, Any]", servers)


def _hint_without_servers(value: Any) -> str:
    """Return what to write in a file without `mcpServers`."""
    table = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if isinstance(table.get("servers"), dict):
        return "rename `servers`, the key of VS Code, to `mcpServers`"
    if any(isinstance(item, dict) and {"command", "url"} & item.keys() for item in table.values()):
        return '{"mcpServers": ...} goes around the servers'
    return f"write {EXAMPLE}"


def _example(path: Path) -> str:
    return f"write {EXAMPLE} to it" if not path.is_dir() else "name a file"


class _ServerReader:
    """Reads one server of a file.

    Args:
        path: file.
        name: name of the server.
        environment: variables that `${NAME}` refers to.
    """

    def __init__(self, path: Path, name: str, environment: Mapping[str, str]):
        self._path = path
        self._name = name
        self._environment = environment
        self.notes: list[str] = []

    def read(self, value: Any) -> ServerConfig:
        """Return the server that a value of `mcpServers` describes."""
        if not isinstance(value, dict):
            raise self._error("", f"it is not an object: `{value!r:.60}`", f"write it as in {EXAMPLE}")
        table = cast("dict[str, Any]", value)
        self._check_keys(table)
        if self._flag(table, "disabled"):
            return ServerConfig(self._name, is_disabled=True)
        transport = self._transport(table)
        if transport == "sse":
            raise self._error(
                "type" if "type" in table else "transport",
                "the SSE transport, which streamable HTTP has replaced, is not supported",
                'use the server\'s URL for streamable HTTP (often one that ends in /mcp) with "type": "http", or '
                'connect by a program: "command": "npx", "args": ["mcp-remote", URL]',
            )
        if transport == "http":
            return ServerConfig(self._name, url=self._url(table), headers=self._table(table, "headers"))
        command = os.path.expanduser(self._text(table, "command"))
        cwd = os.path.expanduser(self._text(table, "cwd")) if table.get("cwd") is not None else None
        arguments = tuple(self._list(table, "args"))
        return ServerConfig(self._name, (command, *arguments), self._table(table, "env"), cwd)

    def _check_keys(self, table: Mapping[str, Any]) -> None:
        """Refuse a misspelled key; note others that are not used here."""
        for key in table.keys() - set(KEYS):
            similar = difflib.get_close_matches(key, KEYS, n=1, cutoff=SIMILARITY)
            if similar and similar[0] not in table:
                raise self._error(key, "there is no such key", f"did you mean `{similar[0]}`?")
        if unused := sorted(table.keys() - set(KEYS)):
            names = ", ".join(f"`{key}`" for key in unused)
            self.notes.append(f"{self._path.name}: server `{self._name}`: {names} not used by kimi-mlx")

    def _transport(self, table: Mapping[str, Any]) -> Literal["stdio", "http", "sse"]:
        """Return the transport: that of `type` or `transport`, else what `command` or `url` implies."""
        has_command, has_url = table.get("command") is not None, table.get("url") is not None
        if has_command and has_url:
            raise self._error("url", "it has both `command` and `url`", "remove one of the two")
        key = next((key for key in ("type", "transport") if table.get(key) is not None), None)
        if key is None:
            if not has_command and not has_url:
                raise self._error(
                    "", "it has neither `command` nor `url`", 'write "command": "PROGRAM", or "url": "https://..."'
                )
            return "stdio" if has_command else "http"
        transport = TYPES.get(self._text(table, key))
        if transport is None:
            raise self._error(key, f"`{table[key]}` is not a transport", 'write "stdio" or "http"')
        needed = "command" if transport == "stdio" else "url"
        if table.get(needed) is None:
            raise self._error(needed, f"it is missing, and `{key}` is `{table[key]}`", f"write `{needed}`")
        return transport

    def _url(self, table: Mapping[str, Any]) -> str:
        url = self._text(table, "url")
        if not re.match(r"https?://[^/\s]", url):
            raise self._error(
                "url", f"`{url}` is not an HTTP URL", 'write "http://HOST:PORT/mcp" or "https://HOST/mcp"'
            )
        return url

    def _text(self, table: Mapping[str, Any], key: str) -> str:
        value = table.get(key)
        if not isinstance(value, str) or not value:
            raise self._error(key, f"`{value!r:.60}` is not a string", f'write "{key}": "..."')
        return self._expand(key, value)

    def _flag(self, table: Mapping[str, Any], key: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise self._error(key, f"`{value!r:.60}` is neither true nor false", "write true or false, without quotes")
        return value

    def _list(self, table: Mapping[str, Any], key: str) -> list[str]:
        values = table.get(key, [])
        if not isinstance(values, list):
            raise self._error(key, f"`{values!r:.60}` is not a list", f'write "{key}": ["...", "..."]')
        for i, value in enumerate(cast("list[Any]", values)):
            if not isinstance(value, str):
                raise self._error(f"{key}[{i}]", f"`{value!r:.60}` is not a string", "write it in quotes")
        return [self._expand(f"{key}[{i}]", value) for i, value in enumerate(cast("list[str]", values))]

    def _table(self, table: Mapping[str, Any], key: str) -> dict[str, str]:
        values = table.get(key, {})
        if not isinstance(values, dict):
            raise self._error(key, f"`{values!r:.60}` is not an object", f'write "{key}": {{"NAME": "VALUE"}}')
        for name, value in cast("dict[str, Any]", values).items():
            if not isinstance(value, str):
                raise self._error(f"{key}.{name}", f"`{value!r:.60}` is not a string", "write it in quotes")
        return {name: self._expand(f"{key}.{name}", value) for name, value in cast("dict[str, str]", values).items()}

    def _expand(self, key: str, text: str) -> str:
        """Replace references to variables of the environment."""

        def value(match: re.Match[str]) -> str:
            name, default = match[1], match[2]
            expanded = self._environment.get(name, default)
            if expanded is None:
                hint = f"run `export {name}=...` first, or write a default: `${{{name}:-VALUE}}`"
                raise self._error(key, f"the variable `{name}` is not set", hint)
            return expanded

        if "\0" in (expanded := VARIABLE.sub(value, text)):
            raise self._error(key, "it contains a NUL character", "remove it")
        if reference := re.search(r"\$\{[^}]*\}", VARIABLE.sub("", text)):
            raise self._error(key, f"`{reference[0]}` is not supported", "write ${NAME} or ${NAME:-default}")
        return expanded

    def _error(self, key: str, problem: str, hint: str) -> ToolConfigError:
        place = f"`mcpServers.{self._name}{'.' if key else ''}{key}`"
        return ToolConfigError(f"`{self._path}`: {place}: {problem}", hint=hint)
