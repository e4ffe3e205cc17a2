"""Start the MCP servers of a chat, and wait for them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext

from kimi_mlx.cli.chat.options import ToolOptions
from kimi_mlx.cli.chat.output.terminal_text import remove_controls, to_line
from kimi_mlx.cli.chat.signal_handlers import ctrl_c_raises
from kimi_mlx.cli.chat.tools.tool_loop import ToolLoop
from kimi_mlx.cli.chat.tools.tool_permissions import Permissions
from kimi_mlx.cli.output import print_note, print_warning, slow_status
from kimi_mlx.errors import ToolError
from kimi_mlx.tools.servers import McpServers
from kimi_mlx.units import format_count

MAX_NAMES = 3
"""Number of servers that a status names."""


@contextmanager
def open_tools(options: ToolOptions, is_quiet: bool = False) -> Generator[ToolLoop]:
    """Start the MCP servers while the model is loaded, and end them after the chat.

    Args:
        options: files with the servers, and allowed tools.
        is_quiet: whether to show no status and no notes.

    Raises:
        ToolError: the package `mcp` is not installed.
        UsageError: a file is wrong.
    """
    configs, notes = options.read_servers()
    permissions = Permissions(options.allowed)
    if not configs:
        yield ToolLoop(permissions=permissions)
        return
    for note in () if is_quiet else notes:
        print_note(note)
    servers = McpServers(configs)
    with servers:
        yield ToolLoop(servers, permissions, options.max_rounds)
        with slow_status(is_quiet) as set_status:
            set_status("ending the MCP servers")
            servers.close()


def wait_for_servers(tools: ToolLoop, is_quiet: bool = False, can_skip: bool = False) -> None:
    """Wait until each server is ready or has failed, and report those that have failed.

    Args:
        tools: result of open_tools.
        is_quiet: whether to show no status, and only warnings.
        can_skip: whether Ctrl-C ends the wait, and not the command.

    Raises:
        ToolError: no server has started.
    """
    servers = tools.servers
    if servers is None:
        return
    try:
        with ctrl_c_raises() if can_skip else nullcontext(), slow_status(is_quiet) as set_status:
            servers.wait(lambda names: set_status(f"starting MCP servers: {_list_names(names)}"))
    except KeyboardInterrupt:
        if not can_skip:
            raise
        print_note(f"[not waiting for {_list_names(servers.starting)}; their tools come when they are ready]")
    failed = [status for status in servers.status() if status.state == "failed"]
    for status in failed:
        print_warning(f"MCP server {to_line(status.name)}: {remove_controls(status.error)}")
    if failed and all(status.state in ("failed", "disabled") for status in servers.status()):
        raise ToolError("no MCP server has started", hint="correct the file of `--mcp`, or leave the option out")
    for pattern in tools.permissions.unknown_patterns(servers.tools):
        print_warning(f"--allow {pattern}: no server has such a tool")
    if not is_quiet:
        num_ready = sum(status.state == "ready" for status in servers.status())
        print_note(f"{format_count(len(servers.tools), 'tool')} of {format_count(num_ready, 'MCP server')}")


def _list_names(names: Sequence[str]) -> str:
    rest = len(names) - MAX_NAMES
    shown = ", ".join(to_line(name) for name in names[:MAX_NAMES])
    return f"{shown} and {rest} more" if rest > 0 else shown
