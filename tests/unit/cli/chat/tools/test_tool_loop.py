"""Rounds of tool calls, with real servers and a model that answers what a test says."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from kimi_mlx.cli.chat.tools.tool_loop import ToolLoop
from kimi_mlx.cli.chat.tools.tool_permissions import Answer, Permissions
from kimi_mlx.cli.chat.tools.tool_results import MAX_RESULT_TOKENS
from kimi_mlx.engine.events import Finished, FinishReason, Statistics
from kimi_mlx.errors import EngineError, ImageError, KimiMlxError
from kimi_mlx.session.chat_model import ChatEvent, ChatOptions
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.session.model_status import ModelStatus
from kimi_mlx.text.messages import Delta, Message, ToolCall
from kimi_mlx.tools.config import ServerConfig
from kimi_mlx.tools.declarations import DeclaredTool
from kimi_mlx.tools.servers import McpServers

HOSTILE = ServerConfig("hostile", (sys.executable, "-S", str(Path(__file__).parents[4] / "hostile_mcp_server.py")))
PATIENCE_S = 20.0


class ScriptedModel:
    """A model whose answers are fixed: a text, or the names of the tools that it calls.

    Attributes:
        offered: names of the tools that each answer could have called.
        received: messages that each answer had.
    """

    name = "scripted"
    context = 100_000
    image_error: KimiMlxError | None = EngineError("no images")

    def __init__(self, *answers: str | Sequence[str], reason: FinishReason = "stop"):
        self._answers = iter(answers)
        self._reason: FinishReason = reason
        self._num_calls = 0
        self.offered: list[list[str]] = []
        self.received: list[list[Message]] = []

    def generate(self, messages: Sequence[Message], options: ChatOptions) -> Iterator[ChatEvent]:
        self.received.append(list(messages))
        self.offered.append([tool["function"]["name"] for tool in options.prompt_tools or ()])
        answer = next(self._answers)
        if isinstance(answer, str):
            yield Delta(answer)
        else:
            calls = [self._call(name) for name in answer]
            yield Delta("Let me see.", tool_calls=tuple(calls))
        yield Finished(self._reason, Statistics(1, 0, 1, 0.1, 0.1, 1))

    def _call(self, name: str) -> ToolCall:
        self._num_calls += 1
        return ToolCall(f"functions.{name}:{self._num_calls - 1}", name, "{}")

    def count_tokens(self, messages: Sequence[Message], options: ChatOptions) -> int:
        return sum(len(str(message.content)) for message in messages) // 4

    def prepare_media(self, kind: str, source: str | bytes, place: str) -> Sequence[object]:
        if not bytes(source).startswith(b"\x89PNG"):  # type: ignore[arg-type]
            raise ImageError(place, "broken")
        return []

    def recommended_sampling(self, options: ChatOptions) -> Mapping[str, float]:
        return {}

    def status(self) -> ModelStatus:
        return ModelStatus(self.name)

    def cancel(self) -> None: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


class View:
    """Remembers what was shown."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.finished: list[tuple[str, str, bool]] = []
        self.notes: list[str] = []

    def tool_started(self, call: ToolCall) -> None:
        self.started.append(call.name)

    def tool_finished(self, call: ToolCall, result: str, is_error: bool = False) -> None:
        self.finished.append((call.name, result, is_error))

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def paused(self) -> Generator[None]:
        yield


@pytest.fixture(scope="module")
def servers() -> Iterator[McpServers]:
    with McpServers([HOSTILE]) as servers:
        servers.wait()
        yield servers


def run(
    servers: McpServers | None, *answers: str | Sequence[str], allowed: Sequence[str] = ("all",), max_rounds: int = 5
) -> tuple[Conversation, View, ToolLoop]:
    model = ScriptedModel(*answers)
    conversation, view = Conversation(model), View()  # type: ignore[arg-type]
    loop = ToolLoop(servers, Permissions(allowed), max_rounds)
    for _ in loop.run(conversation, conversation.ask("go"), view):
        pass
    return conversation, view, loop


def contents(conversation: Conversation) -> list[tuple[str, object]]:
    return [(message.role, message.content) for message in conversation.messages]


def test_without_servers_an_answer_passes_through() -> None:
    conversation, _, _ = run(None, ["good"])
    assert [message.role for message in conversation.messages] == ["user", "assistant"]


def test_results_go_back_to_the_model(servers: McpServers) -> None:
    conversation, view, loop = run(servers, ["good", "slow"], ["good"], "done")
    assert contents(conversation) == [
        ("user", "go"),
        ("assistant", "Let me see."),
        ("tool", "good is done"),
        ("tool", "slow is done"),
        ("assistant", "Let me see."),
        ("tool", "good is done"),
        ("assistant", "done"),
    ]
    assert [message.tool_call_id for message in conversation.messages if message.role == "tool"] == [
        "functions.good:0",
        "functions.slow:1",
        "functions.good:2",
    ]
    assert view.started[:2] == ["good", "slow"]
    assert [record.server for record in loop.records] == ["hostile"] * 3
    assert "good" in conversation.model.offered[0]  # type: ignore[attr-defined]


def test_calls_of_one_answer_run_at_the_same_time(tmp_path: Path) -> None:
    configs = [ServerConfig(name, HOSTILE.command, {"MEETING": str(tmp_path)}) for name in ("one", "two")]
    with McpServers(configs) as own:
        own.wait()
        conversation, _, _ = run(own, ["one__meet", "two__meet"], "done")
    assert [content for role, content in contents(conversation) if role == "tool"] == ["met", "met"]


def test_the_model_receives_errors(servers: McpServers) -> None:
    conversation, view, _ = run(servers, ["rpc_error", "no_such_tool"], "done")
    results = [str(content) for role, content in contents(conversation) if role == "tool"]
    assert results[0].startswith("Error: server `hostile`: no")
    assert results[1].startswith("Error: there is no tool `no_such_tool`")
    assert all(is_error for _, _, is_error in view.finished)


def test_a_call_without_permission_is_refused(servers: McpServers) -> None:
    conversation, view, _ = run(servers, ["good", "slow"], "done", allowed=["slo*"])
    results = [content for role, content in contents(conversation) if role == "tool"]
    assert results == ["Error: the user did not allow this call", "slow is done"]
    assert view.notes == ["to allow it, add --allow good"]


def test_after_the_limit_the_model_answers_without_tools(servers: McpServers) -> None:
    conversation, view, _ = run(servers, ["good"], ["good"], ["good"], "done", max_rounds=2)
    assert contents(conversation)[-2:] == [
        ("tool", "Error: not run: the limit of 2 rounds of calls is reached; answer with what you have"),
        ("assistant", "done"),
    ]
    assert view.notes == ["stopped calling tools after 2 rounds (--max-rounds)"]
    model = conversation.model
    assert isinstance(model, ScriptedModel)
    assert [bool(names) for names in model.offered] == [True, True, True, False]
    assert conversation.options.tool_choice == "auto"


def test_a_long_result_is_cut_to_the_context(servers: McpServers) -> None:
    with McpServers([ServerConfig("big", HOSTILE.command, {"BIG_BYTES": "2000000"})]) as own:
        own.wait()
        conversation, _, _ = run(own, ["flood"], "done")
    text = conversation.messages[2].content
    assert isinstance(text, str)
    assert len(text) // 4 <= MAX_RESULT_TOKENS
    assert "characters left out here" in text


def test_results_are_added_although_the_model_cannot_count(
    servers: McpServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise EngineError("lost")

    monkeypatch.setattr(ScriptedModel, "count_tokens", fail)
    with McpServers([ServerConfig("big", HOSTILE.command, {"BIG_BYTES": "2000000"})]) as own:
        own.wait()
        conversation, _, _ = run(own, ["flood", "good"], "done")
    assert [role for role, _ in contents(conversation)] == ["user", "assistant", "tool", "tool", "assistant"]


def test_images_go_to_a_model_that_sees(servers: McpServers, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation, _, _ = run(servers, ["picture"], "done")
    assert conversation.messages[2].content == "[an image, which the model cannot see]"
    monkeypatch.setattr(ScriptedModel, "image_error", None)
    conversation, _, _ = run(servers, ["picture"], "done")
    parts = conversation.messages[2].content
    assert isinstance(parts, list)
    assert parts[1]["type"] == "image"


def test_cancellation_ends_the_round_and_is_a_result_for_the_model(servers: McpServers) -> None:
    conversation, view = Conversation(ScriptedModel(["good", "hang"], "never")), View()  # type: ignore[arg-type]
    loop = ToolLoop(servers, Permissions(["all"]))
    timer = threading.Timer(0.5, loop.cancel)
    timer.start()
    started = time.monotonic()
    for _ in loop.run(conversation, conversation.ask("go"), view):
        pass
    timer.join()
    assert time.monotonic() - started < PATIENCE_S
    assert contents(conversation)[2:] == [("tool", "good is done"), ("tool", "Error: cancelled by the user")]
    assert view.finished == [("good", "good is done", False)]


def test_an_interrupted_round_is_complete(servers: McpServers) -> None:
    """A second Ctrl-C raises KeyboardInterrupt somewhere in the wait."""

    class Interrupting(View):
        def tool_finished(self, call: ToolCall, result: str, is_error: bool = False) -> None:
            raise KeyboardInterrupt

    conversation = Conversation(ScriptedModel(["good", "hang"]))  # type: ignore[arg-type]
    loop = ToolLoop(servers, Permissions(["all"]))
    with pytest.raises(KeyboardInterrupt):
        list(loop.run(conversation, conversation.ask("go"), Interrupting()))
    assert [role for role, _ in contents(conversation)] == ["user", "assistant", "tool", "tool"]


def answering(*answers: Answer) -> tuple[Callable[..., Answer], list[str]]:
    """Return a question that is answered, and the names of the tools that were asked about."""
    remaining, asked = iter(answers), []

    def ask(call: ToolCall, tool: DeclaredTool, is_cancelled: threading.Event) -> Answer:
        asked.append(tool.name)
        return next(remaining)

    return ask, asked


def test_answers_to_the_question(servers: McpServers) -> None:
    ask, asked = answering("no", "once", "tool", "all")
    conversation, view = Conversation(ScriptedModel(*[["good"]] * 5, ["slow"], ["empty"], "done")), View()  # type: ignore[arg-type]
    loop = ToolLoop(servers, Permissions())
    loop.permissions.ask = ask
    list(loop.run(conversation, conversation.ask("go"), view))
    assert asked == ["good", "good", "good", "slow"]
    assert loop.permissions.is_allowed(servers.tools[0])
    loop.permissions.reset()
    assert not loop.permissions.is_allowed(servers.tools[0])
    assert [is_error for _, _, is_error in view.finished] == [True] + [False] * 6


@pytest.mark.slow
def test_a_permission_ends_when_the_tool_changes() -> None:
    ask, asked = answering("tool", "tool", "no")
    with McpServers([HOSTILE]) as own:
        own.wait()
        conversation, view = Conversation(ScriptedModel(["good", "grow"], "done", ["good"], "done")), View()  # type: ignore[arg-type]
        loop = ToolLoop(own, Permissions())
        loop.permissions.ask = ask
        list(loop.run(conversation, conversation.ask("go"), view))
        deadline = time.monotonic() + PATIENCE_S
        while not any(tool.name == "grown" for tool in own.tools):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        list(loop.run(conversation, conversation.ask("again"), view))
    assert asked == ["good", "grow", "good"]
    assert "server hostile changed its tools: +grown ~good" in view.notes


def test_names_of_allow_that_fit_nothing(servers: McpServers) -> None:
    assert Permissions(["good", "x*", "gooood", "all"]).unknown_patterns(servers.tools) == ["gooood"]


def test_a_retry_runs_its_calls(servers: McpServers) -> None:
    conversation, view = Conversation(ScriptedModel("first", ["good"], "done")), View()  # type: ignore[arg-type]
    loop = ToolLoop(servers, Permissions(["all"]))
    list(loop.run(conversation, conversation.ask("go"), view))
    list(loop.run(conversation, conversation.retry(), view))
    assert contents(conversation)[-2:] == [("tool", "good is done"), ("assistant", "done")]


def test_calls_of_a_cancelled_answer_do_not_run(servers: McpServers) -> None:
    model = ScriptedModel(["good"], reason="cancelled")
    conversation, view = Conversation(model), View()  # type: ignore[arg-type]
    list(ToolLoop(servers, Permissions(["all"])).run(conversation, conversation.ask("go"), view))
    assert view.started == []


def test_records_as_json(servers: McpServers) -> None:
    _, _, loop = run(servers, ["good"], "done")
    assert json.loads(json.dumps(loop.records[0].to_dict())) == {
        "id": "functions.good:0",
        "name": "good",
        "arguments": "{}",
        "server": "hostile",
        "result": "good is done",
        "is_error": False,
    }
