"""A scripted model calls custom tools of Chat Completions, and Anthropic's tools, which the official clients run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from anthropic import Anthropic
from anthropic.lib.tools import BetaBuiltinFunctionTool
from anthropic.tools.memory import BetaLocalFilesystemMemoryTool
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionMessageToolCallUnion
from pydantic import TypeAdapter

from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import SessionOptions
from tests.scripted_model import Answer, Call, write_scripted_model
from tests.server.running_server import RunningServer, serving

CALL: TypeAdapter[ChatCompletionMessageToolCallUnion] = TypeAdapter(ChatCompletionMessageToolCallUnion)
NOTE_TEXT = 'It went "left" ☃'
NOTE = json.dumps({"input": NOTE_TEXT}, ensure_ascii=False)
ANSWERS = (
    Answer("Watch.", calls=(Call("robot", "move left 17"), Call("note", NOTE))),
    Answer("It moved."),
    Answer(
        calls=(
            Call("memory", {"command": "create", "path": "/memories/key.txt", "file_text": "Under the mat"}),
            Call("bash", {"command": "uname -s"}),
        ),
        after="Remember",
        num_earlier_calls=0,
    ),
)
LARK = 'start: "move " DIRECTION " " COUNT\nDIRECTION: "left" | "right"\nCOUNT: /[1-9][0-9]?/'
TOOLS: list[Any] = [
    {"type": "builtin_function", "function": {"name": "$web_search"}},
    {
        "type": "custom",
        "custom": {
            "name": "robot",
            "description": "Move the robot",
            "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": LARK}},
        },
    },
    {"type": "custom", "custom": {"name": "note", "description": "Take a note"}},
]
INPUTS = [("robot", "move left 17"), ("note", NOTE_TEXT)]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = write_scripted_model(tmp_path_factory.mktemp("scripted"), ANSWERS)
    with closing(open_session(SessionOptions(folder))) as session, serving(session, folder=folder) as server:
        yield server


@pytest.mark.parametrize("is_streamed", [False, True])
def test_custom_tools_of_chat_completions(scripted: RunningServer, is_streamed: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "Move"}]
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="any", max_retries=0) as client:
        for answer in ANSWERS[:2]:
            body: Any = {"model": "kimi-mini", "messages": messages, "tools": TOOLS, "max_tokens": 200}
            if is_streamed:
                state = ChatCompletionStreamState()
                for chunk in client.chat.completions.create(**body, stream=True):
                    state.handle_chunk(chunk)
                choice: Any = state.current_completion_snapshot.choices[0]
            else:
                choice = client.chat.completions.create(**body).choices[0]
            message = choice.message.to_dict()
            assert message["content"] == answer.text
            calls = [{k: v for k, v in call.items() if k != "index"} for call in message.get("tool_calls") or ()]
            for call in calls:
                CALL.validate_python(call, strict=True)
            if answer.calls:
                assert [(call["custom"]["name"], call["custom"]["input"]) for call in calls] == INPUTS
            assert choice.finish_reason == ("tool_calls" if answer.calls else "stop")
            messages.append({"role": "assistant", "content": message["content"], "tool_calls": calls or None})
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": "done"} for call in calls]


def test_a_required_custom_tool_is_called(scripted: RunningServer) -> None:
    choice: Any = {"type": "custom", "custom": {"name": "robot"}}
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="any", max_retries=0) as client:
        given = client.chat.completions.create(
            model="kimi-mini", messages=[{"role": "user", "content": "Move"}], tools=TOOLS, tool_choice=choice
        )
    (call,) = [call.to_dict() for call in given.choices[0].message.tool_calls or ()]
    assert call["custom"] == {"name": "robot", "input": "move left 17"}
    notes = given.to_dict()["kimi_mlx_notes"]
    assert notes == ["left out, because they run at Moonshot: builtin_function `$web_search`"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_anthropic_client_runs_its_tools(scripted: RunningServer, tmp_path: Path, is_streamed: bool) -> None:
    commands: list[str] = []

    class Bash(BetaBuiltinFunctionTool):
        """The client's side of Anthropic's shell."""

        def to_dict(self) -> Any:
            return {"type": "bash_20250124", "name": "bash"}

        def call(self, input: Any) -> str:
            commands.append(input["command"])
            return "Linux"

    hosted: Any = {"type": "web_search_20250305", "name": "web_search"}
    with Anthropic(base_url=scripted.url, api_key="any", max_retries=0) as client:
        runner = client.beta.messages.tool_runner(
            model="claude-x",
            max_tokens=1000,
            messages=[{"role": "user", "content": "Remember where the key is"}],
            tools=[BetaLocalFilesystemMemoryTool(str(tmp_path)), Bash(), hosted],
            stream=is_streamed,
        )
        last = runner.until_done()
    assert (tmp_path / "memories" / "key.txt").read_text() == "Under the mat"
    assert commands == ["uname -s"]
    assert [block.text for block in last.content if block.type == "text"] == ["It moved."]
    assert json.loads(last.to_json())["kimi_mlx_notes"] == [
        "left out, because they run at Anthropic: web_search_20250305"
    ]
