"""The command `/tools` of a conversation in the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.chat.commands.commands import Command
from kimi_mlx.cli.chat.output.terminal_text import remove_controls, shorten, to_line
from kimi_mlx.cli.chat.signal_handlers import ctrl_c_raises
from kimi_mlx.cli.chat.tools.tool_loop import ToolLoop
from kimi_mlx.cli.output import print_note, slow_status, stderr
from kimi_mlx.errors import UsageError
from kimi_mlx.tools.declarations import DeclaredTool
from kimi_mlx.tools.servers import McpServers, ServerStatus

MAX_ABOUT = 200
"""Maximum number of cells of a tool's description in the list."""

NO_SERVERS = "there are no tools"
HINT = "start with `--mcp FILE`, a file with `mcpServers` (docs/tools.md)"


class ToolCommands:
    """Lists servers and tools, describes a tool, and restarts servers.

    Args:
        tools: tools of the conversation.
    """

    def __init__(self, tools: ToolLoop):
        self._tools = tools

    def commands(self) -> Sequence[Command]:
        """Return the commands."""
        return [
            Command(
                "/tools",
                "[NAME|reload [SERVER]]",
                "tools of MCP servers",
                self._run,
                "Model",
                details=(
                    "`/tools` lists the MCP servers and their tools, `/tools NAME` describes a tool, and "
                    "`/tools reload` starts all servers again, or one of them."
                ),
                complete=self._complete,
            )
        ]

    def _complete(self, argument: str) -> Iterable[str]:
        servers = self._tools.servers
        if servers is None:
            return ()
        if argument.startswith("reload "):
            return [status.name for status in servers.status()]
        return ["reload", *(tool.name for tool in servers.tools)]

    def _run(self, argument: str) -> None:
        servers = self._tools.servers
        if servers is None:
            raise UsageError(NO_SERVERS, hint=HINT)
        word, *rest = argument.split() or [""]
        if word == "reload" and len(rest) <= 1:
            self._reload(servers, rest[0] if rest else None)
        elif word:
            self._describe(servers, argument)
            return
        for status in servers.status():
            self._list(status)

    def _reload(self, servers: McpServers, name: str | None) -> None:
        """Start servers again, and show their status."""
        names = [status.name for status in servers.status()]
        if name is not None and name not in names:
            raise UsageError(f"there is no server `{name}`", hint=f"there are: {', '.join(names)}")
        try:
            with ctrl_c_raises(), slow_status() as set_status:
                set_status(f"starting {to_line(name or 'all servers')}")
                servers.restart(name).result()
        except KeyboardInterrupt:
            print_note("[not waiting; they are still starting]")
        self._tools.permissions.reset()

    def _list(self, status: ServerStatus) -> None:
        """Show a server and its tools."""
        about = {"ready": status.title, "failed": status.error}.get(status.state, status.state)
        heading = Text(to_line(status.name), style="bold")
        heading.append(f"  {remove_controls(about)}", style="red" if status.state == "failed" else "dim")
        stderr.print(heading, soft_wrap=False)
        table = Table.grid(padding=(0, 2))
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for tool in status.tools:
            mark = "✓" if self._tools.permissions.is_allowed(tool) else " "
            table.add_row(f"{mark} {tool.name}", shorten(to_line(tool.tool.description), MAX_ABOUT))
        if status.tools:
            stderr.print(table, soft_wrap=False)

    def _describe(self, servers: McpServers, name: str) -> None:
        """Show what a tool declares."""
        tools = {tool.name: tool for tool in servers.tools}
        if name not in tools:
            raise UsageError(
                f"there is no tool `{name}`", hint="`/tools` lists the tools; `/tools reload` starts servers"
            )
        stderr.print(tool_description(tools[name], self._tools.permissions.is_allowed(tools[name])), soft_wrap=False)


def tool_description(tool: DeclaredTool, is_allowed: bool) -> Text:
    """Return what a tool declares, as text that cannot control the terminal."""
    text = Text(tool.name, style="bold")
    text.append(
        f"  server {to_line(tool.tool.server)}, {'allowed' if is_allowed else 'needs permission for each call'}", "dim"
    )
    text.append(f"\n{remove_controls(tool.tool.description)}\n", "default")
    schema = json.dumps(tool.declaration["function"]["parameters"], indent=2, ensure_ascii=False)
    text.append(remove_controls(schema), "dim")
    if tool.note:
        text.append(f"\nNot enforced in its arguments: {to_line(tool.note)}", "dim")
    return text
