"""Whatever happens in a conversation, the history has the same messages."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator, Iterator, Sequence
from typing import cast

import pytest

from kimi_mlx.errors import EngineError, KimiMlxError
from kimi_mlx.history.log import ConversationLog
from kimi_mlx.history.store import HistoryStore
from kimi_mlx.session.chat_model import ChatEvent, ChatModel, ChatOptions
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.text.messages import Delta, Message, ToolCall
from tests.unit.history.conftest import finished

CALL = ToolCall("functions.add:0", "add", "{}")


class RandomModel:
    """A model whose answers have text, reasoning or a call, and end well, are cancelled, or fail at any moment."""

    name = "random"

    def __init__(self, choices: random.Random):
        self._choices = choices

    def generate(self, messages: Sequence[Message], options: ChatOptions) -> Iterator[ChatEvent]:
        choose = self._choices
        for _ in range(choose.randrange(4)):
            yield choose.choice([Delta("text "), Delta(reasoning="thought "), Delta(tool_calls=(CALL,))])
            if choose.random() < 0.2:
                raise EngineError("the step failed")
        yield finished(choose.choice(["stop", "length", "cancelled"]))

    def reset(self) -> None:
        pass


ACTIONS = ("ask", "ask", "ask with an image", "retry", "retry", "retry", "undo", "result", "drop", "fork", "reset")


def act(conversation: Conversation, log: ConversationLog, choices: random.Random) -> None:
    """Do something at random; read an answer to its end, or only its beginning."""
    action = choices.choice(ACTIONS)
    if action == "ask":
        read(conversation.ask("question"), choices)
    elif action == "ask with an image":
        read(conversation.ask([{"type": "image", "image": b"pixels"}, {"type": "text", "text": "What?"}]), choices)
    elif action == "retry":
        read(conversation.retry(), choices)
    elif action == "undo":
        conversation.undo()
    elif action == "result" and conversation.messages:
        conversation.add_tool_result(CALL, "3")
        read(conversation.answer(), choices)
    elif action == "drop" and conversation.media_parts:
        conversation.remove_part(choices.choice(conversation.media_parts))
    elif action == "fork" and conversation.messages:
        log.fork()
    elif action == "reset" and choices.random() < 0.3:
        conversation.reset()


def read(answer: Generator[ChatEvent, None, None], choices: random.Random) -> None:
    with contextlib.suppress(KimiMlxError), contextlib.closing(answer):
        for number, _ in enumerate(answer):
            if number == 2 and choices.random() < 0.2:
                break


@pytest.mark.parametrize("seed", range(20))
def test_the_history_equals_the_conversation(store: HistoryStore, warnings: list[str], seed: int) -> None:
    choices = random.Random(seed)
    conversation = Conversation(cast("ChatModel", RandomModel(choices)))
    log = ConversationLog(store, "random", dict, warnings.append)
    conversation.listener = log
    for _ in range(25):
        act(conversation, log, choices)
        number = log._number
        stored = [] if number is None else [record.message for record in store.messages(number)]
        assert stored == conversation.messages
    assert warnings == []
