"""The file that lists MCP servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.errors import ToolConfigError
from kimi_mlx.tools.config import ServerConfig, read_config

ENVIRONMENT = {"HOME": "/home/a", "TOKEN": "secret"}


def write(folder: Path, value: Any) -> Path:
    path = folder / "mcp.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def read(folder: Path, **server: Any) -> ServerConfig:
    configs, _ = read_config([write(folder, {"mcpServers": {"a": server}})], ENVIRONMENT)
    return configs[0]


def test_forms_of_other_programs(tmp_path: Path) -> None:
    assert read(tmp_path, command="npx", args=["-y", "x"], env={"K": "${TOKEN}"}) == ServerConfig(
        "a", ("npx", "-y", "x"), {"K": "secret"}
    )
    assert read(tmp_path, type="http", url="https://a.b/mcp", headers={"A": "Bearer ${env:TOKEN}"}) == ServerConfig(
        "a", url="https://a.b/mcp", headers={"A": "Bearer secret"}
    )
    assert read(tmp_path, transport="streamable-http", url="http://a:1/${WHERE:-mcp}").url == "http://a:1/mcp"
    assert read(tmp_path, type="stdio", command="x", cwd="/tmp", args=["$5", "${X:-}"]) == ServerConfig(
        "a", ("x", "$5", ""), cwd="/tmp"
    )
    assert read(tmp_path, command="x", disabled=True).is_disabled
    assert read(tmp_path, disabled=True, type="sse").is_disabled


def test_order_and_several_files(tmp_path: Path) -> None:
    one = tmp_path / "one.json"
    one.write_text('{"mcpServers": {"b": {"command": "x"}, "a": {"command": "y"}}, "theme": "dark"}')
    two = write(tmp_path, {"mcpServers": {"c": {"command": "z"}}})
    assert [config.name for config in read_config([one, two])[0]] == ["b", "a", "c"]
    with pytest.raises(ToolConfigError, match="server `c` is also in another file"):
        read_config([two, two])


def test_keys_that_are_not_used_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"mcpServers": {"a": {"command": "x", "alwaysAllow": [], "timeout": 9}}})
    assert read_config([path])[1] == ["mcp.json: server `a`: `alwaysAllow`, `timeout` not used by kimi-mlx"]


@pytest.mark.parametrize(
    ("server", "message", "hint"),
    [
        ({}, "`mcpServers.a`: it has neither `command` nor `url`", '"command": "PROGRAM"'),
        ("npx", "`mcpServers.a`: it is not an object: `'npx'`", "write it as in"),
        ({"comand": "x"}, "`mcpServers.a.comand`: there is no such key", "did you mean `command`?"),
        ({"command": "x", "url": "y"}, "both `command` and `url`", "remove one"),
        ({"command": ["x"]}, "`mcpServers.a.command`: `['x']` is not a string", '"command": "..."'),
        ({"command": "x", "args": "y"}, "`mcpServers.a.args`: `'y'` is not a list", '["...", "..."]'),
        ({"command": "x", "args": [1]}, "`mcpServers.a.args[0]`: `1` is not a string", "in quotes"),
        ({"command": "x", "env": {"A": 1}}, "`mcpServers.a.env.A`: `1` is not a string", "in quotes"),
        ({"command": "x", "env": []}, "`mcpServers.a.env`: `[]` is not an object", '{"NAME": "VALUE"}'),
        ({"command": "x", "disabled": "no"}, "`mcpServers.a.disabled`: `'no'`", "true or false"),
        ({"command": "${NOPE}"}, "`mcpServers.a.command`: the variable `NOPE` is not set", "export NOPE="),
        ({"command": "x", "args": ["${input:key}"]}, "`${input:key}` is not supported", "${NAME:-default}"),
        ({"command": "a\0b"}, "contains a NUL character", "remove it"),
        ({"url": "localhost/mcp"}, "`mcpServers.a.url`: `localhost/mcp` is not an HTTP URL", "http://HOST:PORT/mcp"),
        ({"type": "sse", "url": "http://a/sse"}, "`mcpServers.a.type`: the SSE transport", "mcp-remote"),
        ({"type": "websocket", "url": "http://a"}, "`websocket` is not a transport", '"stdio" or "http"'),
        ({"type": "http", "command": "x"}, "`mcpServers.a.url`: it is missing", "write `url`"),
    ],
)
def test_errors_name_server_and_key(tmp_path: Path, server: Any, message: str, hint: str) -> None:
    with pytest.raises(ToolConfigError) as caught:
        read_config([write(tmp_path, {"mcpServers": {"a": server}})], ENVIRONMENT)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("{", "is not JSON", "no comments"),
        ("[" * 100_000, "is not JSON", "no comments"),
        ("[]", "it has no `mcpServers`", '{"mcpServers"'),
        ('{"servers": {}}', "it has no `mcpServers`", "rename `servers`"),
        ('{"git": {"command": "x"}}', "it has no `mcpServers`", "goes around the servers"),
        ('{"mcpServers": []}', "`mcpServers` is not an object", "write"),
    ],
)
def test_errors_of_the_file(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(ToolConfigError) as caught:
        read_config([write(tmp_path, text)])
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ToolConfigError, match="cannot be read: No such file"):
        read_config([tmp_path / "none.json"])
    with pytest.raises(ToolConfigError, match="cannot be read: Is a directory"):
        read_config([tmp_path])
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(ToolConfigError, match="is not UTF-8"):
        read_config([tmp_path / "x"])
