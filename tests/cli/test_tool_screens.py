"""What a user sees of tools, at three widths: kimi-mini calls the tools of a server, and `/tools` lists them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_mlx.cli.chat.commands import tool_commands
from kimi_mlx.cli.chat.commands.tool_commands import ToolCommands
from kimi_mlx.cli.chat.tools.tool_loop import ToolLoop
from kimi_mlx.cli.chat.tools.tool_permissions import Answer, question_about
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.chat_model import ChatOptions
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.session.session import Session
from kimi_mlx.text.messages import ToolCall
from kimi_mlx.tools.config import ServerConfig
from kimi_mlx.tools.declarations import DeclaredTool
from kimi_mlx.tools.servers import McpServers
from tests.cli.test_screens import SCREENS, WIDTHS, Stage
from tests.fakes import KIMI_MINI, chat_model_of
from tests.screen import check_screens

TESTS = Path(__file__).parents[1]
CRASH = (sys.executable, "-S", "-c", "import sys; sys.exit('TOKEN is not set: \\x1b[31mrun `login`')")


@pytest.fixture(scope="module")
def servers() -> Iterator[McpServers]:
    configs = [
        ServerConfig("toys", (sys.executable, str(TESTS / "mcp_server.py"))),
        ServerConfig("search", CRASH),
        ServerConfig("mail", is_disabled=True),
    ]
    with McpServers(configs) as servers:
        servers.wait()
        yield servers


@pytest.mark.slow
def test_calls(session: Session, servers: McpServers, monkeypatch: pytest.MonkeyPatch) -> None:
    screens: dict[str, str] = {}
    model = chat_model_of(session, ChatTokenizer.load(KIMI_MINI))
    for columns in WIDTHS:
        stage = Stage(columns, monkeypatch)
        tools = ToolLoop(servers)
        answers: list[Answer] = ["tool", "once"]

        def ask(
            call: ToolCall,
            tool: DeclaredTool,
            is_cancelled: threading.Event,
            stage: Stage = stage,
            answers: list[Answer] = answers,
        ) -> Answer:
            stage.console.print(question_about(tool, stage.console.width), end="", soft_wrap=True)
            stage.screen.write("t\n" if len(answers) == 2 else "o\n")
            return answers.pop(0)

        tools.permissions.ask = ask
        conversation = Conversation(model, ChatOptions(sampling={"temperature": 0.0}))
        for request in ("Roll 4 dice.", "Roll 9 dice.", "Wake me at 07:30."):
            stage.screen.write(f"\n> {request}\n\n")
            view = stage.open()
            for event in tools.run(conversation, conversation.ask(request), view):
                view.show(event)
            view.finish()
        screens[f"{columns} columns"] = stage.screen.text
    check_screens(SCREENS, "tools", screens)


def test_list(servers: McpServers, monkeypatch: pytest.MonkeyPatch) -> None:
    screens: dict[str, str] = {}
    for columns in WIDTHS:
        stage = Stage(columns, monkeypatch)
        monkeypatch.setattr(tool_commands, "stderr", stage.console)
        command = ToolCommands(ToolLoop(servers)).commands()[0]
        command.run("")
        screens[f"{columns} columns"] = stage.screen.text
        command.run("roll_dice")
        screens[f"{columns} columns, one tool"] = stage.screen.text
    check_screens(SCREENS, "tools_list", screens)
