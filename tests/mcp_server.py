"""An MCP server with three tools, over stdio, or over streamable HTTP with `--http PORT`.

kimi-mini can call these tools (docs/tools.md), so whole conversations run without a large model.
"""

from __future__ import annotations

import json
import sys
from random import Random

from mcp.server.mcpserver import MCPServer

server = MCPServer("toys", version="1.0")


def answer(**values: str | int) -> str:
    return json.dumps(values, ensure_ascii=False)


@server.tool(description="Switch a light on or off.", structured_output=False)
def turn_light(room: str, state: str) -> str:
    return answer(status="done")


@server.tool(description="Roll dice.", structured_output=False)
def roll_dice(count: int) -> str:
    rng = Random(count)
    return answer(total=sum(rng.randint(1, 6) for _ in range(count)))


@server.tool(description="Set an alarm.", structured_output=False)
def set_alarm(time: str) -> str:
    return answer(alarm="on" if time.count(":") == 1 else "off")


if __name__ == "__main__":
    if "--http" in sys.argv:
        server.run("streamable-http", port=int(sys.argv[sys.argv.index("--http") + 1]))
    else:
        server.run("stdio")
