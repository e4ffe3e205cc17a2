"""A conversation: what is kept of answers that end early, tools, undo, retry, fork, and what a listener is told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.engine.events import Finished, FinishReason, Statistics
from kimi_mlx.errors import EngineError, GrammarError, UsageError
from kimi_mlx.model.config import load_config
from kimi_mlx.session.chat_model import ChatEvent, ChatOptions
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.session.local_chat_model import LocalChatModel
from kimi_mlx.session.model_status import ModelDeployment
from kimi_mlx.text.messages import Delta, Message, ToolCall
from tests.fakes import KIMI_MINI, FixedSession, chat_model_of, conversation_of, mini_tokenizer

STATISTICS = Statistics(1, 0, 1, 0.1, 0.1, 0)
CALL = ToolCall("functions.f:0", "f", "{}")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


class ScriptedModel(LocalChatModel):
    """A model whose answers are given: deltas, then a reason, or an error to raise."""

    def __init__(self, *answers: Sequence[Delta | FinishReason | Exception]):
        deployment = ModelDeployment("scripted", "hybrid", None, load_config(KIMI_MINI))
        super().__init__(FixedSession([]), mini_tokenizer(), deployment)
        self.answers = list(answers)
        self.asked: list[list[Message]] = []

    def generate(self, messages: Sequence[Message], options: ChatOptions) -> Iterator[ChatEvent]:
        self.asked.append(list(messages))
        for item in self.answers.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item if isinstance(item, Delta) else Finished(item, STATISTICS)


class Replica:
    """A listener that keeps a copy of the messages, and the text of the answer in progress."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.partial = Delta()
        self.ends: list[tuple[str | None, bool]] = []
        self.num_resets = 0

    def on_message(self, message: Message) -> None:
        self.messages.append(message)

    def on_delta(self, delta: Delta) -> None:
        self.partial = self.partial + delta

    def on_finish(self, finished: Finished | None, message: Message | None) -> None:
        assert message is None or self.messages[-1] is message
        self.partial = Delta()
        self.ends.append((finished and finished.reason, message is not None))

    def on_remove(self, count: int) -> None:
        del self.messages[-count:]

    def on_replace(self, index: int, message: Message) -> None:
        self.messages[index] = message

    def on_reset(self) -> None:
        self.messages = []
        self.num_resets += 1


def followed(model: LocalChatModel) -> tuple[Conversation, Replica]:
    conversation = Conversation(model)
    conversation.listener = replica = Replica()
    return conversation, replica


def roles(conversation: Conversation) -> str:
    return " ".join(message.role for message in conversation.messages)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (["stop"], Message("assistant", "")),
        ([Delta("yes"), "stop"], Message("assistant", "yes")),
        ([Delta("yes"), "length"], Message("assistant", "yes")),
        ([Delta("ye"), "cancelled"], Message("assistant", "ye")),
        ([Delta(reasoning="so"), "cancelled"], Message("assistant", "", "so")),
        (["cancelled"], None),
        ([Delta(tool_calls=(CALL,)), "stop"], Message("assistant", "", None, (CALL,))),
        ([Delta(tool_calls=(CALL,)), "cancelled"], None),
        ([Delta("I call"), Delta(tool_calls=(CALL,)), "cancelled"], Message("assistant", "I call")),
        ([EngineError("no")], None),
        ([Delta("ye"), EngineError("no")], Message("assistant", "ye")),
    ],
)
def test_what_an_answer_leaves(answer: list[Delta | FinishReason | Exception], kept: Message | None) -> None:
    conversation, replica = followed(ScriptedModel(answer))
    try:
        list(conversation.ask("hi"))
    except EngineError:
        assert isinstance(answer[-1], EngineError)
    assert conversation.messages == ([] if kept is None else [Message("user", "hi"), kept])
    assert replica.messages == conversation.messages
    reason = None if isinstance(answer[-1], Exception) else answer[-1]
    assert replica.ends == [(reason, kept is not None)]


def test_the_listener_has_what_the_caller_receives_at_every_moment() -> None:
    conversation, replica = followed(ScriptedModel([Delta("a"), Delta("b"), "stop"]))
    shown = Delta()
    for event in conversation.ask("hi"):
        if isinstance(event, Delta):
            shown = shown + event
            assert replica.partial == shown
        assert replica.messages[0].content == "hi"
    assert replica.messages[-1].content == "ab"


def test_a_reader_that_stops_keeps_what_it_read() -> None:
    conversation, replica = followed(ScriptedModel([Delta("a"), Delta("b"), "stop"]))
    answer = conversation.ask("hi")
    next(answer)
    answer.close()
    assert [message.content for message in conversation.messages] == ["hi", "a"]
    assert (replica.messages, replica.ends) == (conversation.messages, [(None, True)])


def test_a_round_of_tools() -> None:
    model = ScriptedModel([Delta(tool_calls=(CALL,)), "stop"], [Delta("21 degrees"), "stop"])
    conversation, replica = followed(model)
    list(conversation.ask("weather?"))
    conversation.add_tool_result(CALL, '{"temperature": 21}')
    list(conversation.answer())
    assert roles(conversation) == "user assistant tool assistant"
    assert model.asked[1][2] == Message("tool", '{"temperature": 21}', tool_call_id=CALL.id)
    assert conversation.undo() == "weather?"
    assert conversation.messages == replica.messages == []
    assert conversation.undo() is None


def test_a_retry_drops_the_rounds_of_the_last_answer_and_restores_them_if_it_fails() -> None:
    model = ScriptedModel(
        [Delta(tool_calls=(CALL,)), "stop"],
        [Delta("21"), "stop"],
        ["cancelled"],
        [EngineError("no")],
        [Delta("22"), "stop"],
    )
    conversation, replica = followed(model)
    list(conversation.ask("weather?"))
    conversation.add_tool_result(CALL, "21")
    list(conversation.answer())
    before = list(conversation.messages)
    list(conversation.retry())
    assert conversation.messages == replica.messages == before
    with pytest.raises(EngineError):
        list(conversation.retry())
    assert conversation.messages == replica.messages == before
    list(conversation.retry())
    assert [message.content for message in conversation.messages] == ["weather?", "22"]
    assert replica.messages == conversation.messages
    assert model.asked[-1] == [Message("user", "weather?")]
    with pytest.raises(UsageError, match="no message"):
        list(Conversation(ScriptedModel()).retry())


def test_a_fork_lives_by_itself() -> None:
    conversation, replica = followed(ScriptedModel([Delta("a"), "stop"], [Delta("b"), "stop"]))
    conversation.system = "Be brief."
    list(conversation.ask("hi"))
    fork = conversation.fork()
    list(fork.ask("more"))
    assert (roles(conversation), roles(fork), fork.system) == (
        "user assistant",
        "user assistant user assistant",
        "Be brief.",
    )
    assert replica.messages == conversation.messages


def test_a_reset_keeps_the_system_prompt() -> None:
    conversation, replica = followed(ScriptedModel([Delta("a"), "stop"]))
    conversation.system = "Be brief."
    list(conversation.ask("hi"))
    conversation.reset()
    assert (conversation.messages, conversation.system, replica.num_resets) == ([], "Be brief.", 1)
    assert [message.role for message in conversation.prompt_messages()] == ["system"]


ACTIONS: list[Callable[[Conversation], Any]] = [
    lambda chat: list(chat.ask("hi")),
    lambda chat: list(chat.answer()) if chat.messages else None,
    lambda chat: list(chat.retry()) if chat.messages else None,
    lambda chat: chat.undo(),
    lambda chat: chat.add_tool_result(CALL, "x") if chat.messages else None,
    lambda chat: chat.reset(),
]
ANSWERS: list[list[Delta | FinishReason | Exception]] = [
    [Delta("a"), "stop"],
    [Delta(tool_calls=(CALL,)), "stop"],
    ["cancelled"],
    [Delta("a"), "cancelled"],
    [Delta("a"), EngineError("no")],
]


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.sampled_from(ANSWERS)), max_size=12))
def test_a_listener_always_has_the_messages_of_the_conversation(steps: list[Any]) -> None:
    model = ScriptedModel()
    conversation, replica = followed(model)
    for act, answer in steps:
        model.answers = [answer]
        with contextlib.suppress(EngineError, UsageError):
            act(conversation)
        assert replica.messages == conversation.messages
        assert not replica.partial


def test_tools_and_schemas_become_the_grammar_of_the_request() -> None:
    conversation = conversation_of("yes")
    session = conversation.model._session  # pyright: ignore
    list(conversation.ask("hi"))
    assert session.requests[-1].grammar is None
    conversation.options = ChatOptions(tools=[TOOL])
    list(conversation.ask("hi"))
    assert json.loads(str(session.requests[-1].grammar))["start"] == "FREE"  # free to call or not
    conversation.options = ChatOptions(tools=[TOOL], constrains_arguments=False)
    list(conversation.ask("hi"))
    assert session.requests[-1].grammar is None
    conversation.options = ChatOptions(tools=[TOOL], tool_choice="required")
    list(conversation.ask("hi"))
    assert "functions.f" in json.loads(str(session.requests[-1].grammar))["arguments"]
    conversation.options = ChatOptions(response_schema={"type": "object"})
    list(conversation.ask("hi"))
    assert not json.loads(str(session.requests[-1].grammar))["arguments"]
    conversation.options = ChatOptions(response_schema={"type": "nothing"}, response_schema_name="--schema")
    with pytest.raises(GrammarError, match="--schema"):
        list(conversation.ask("hi"))


def test_calls_are_numbered_over_the_conversation_whatever_the_model_and_the_file_say() -> None:
    tokenizer = mini_tokenizer()
    special, name = tokenizer.tokenizer.special_tokens, tokenizer.encode("functions.f:0")
    ids = [
        *(special["</think>"], special["<|tool_calls_section_begin|>"], special["<|tool_call_begin|>"], *name),
        *(special["<|tool_call_argument_begin|>"], *tokenizer.encode("{}"), special["<|tool_call_end|>"]),
        special["<|tool_calls_section_end|>"],
    ]
    session = FixedSession(ids)
    conversation = Conversation(chat_model_of(session, tokenizer), ChatOptions(tools=[TOOL]))
    for number in range(2):
        list(conversation.ask("go"))
        call = conversation.messages[-1].tool_calls[0]
        assert call.id == f"functions.f:{number}"
        conversation.add_tool_result(call, "done")
    prompt = tokenizer.decode(session.requests[-1].prompt)
    assert "## Return of functions.f:0" in prompt
    loaded = [
        Message("assistant", "", None, (ToolCall("call_x", "f", "{}"),)),
        Message("tool", "1", tool_call_id="call_x"),
    ]
    conversation.messages = [Message("user", "go"), *loaded]
    list(conversation.ask("again"))
    assert "call_x" not in tokenizer.decode(session.requests[-1].prompt)
    assert conversation.messages[-1].tool_calls[0].id.startswith("call_")
