"""Chats that are killed while they answer: what was shown is in the history, and other chats are not disturbed."""

from __future__ import annotations

import random
import re
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.history.find import find_conversation
from kimi_mlx.history.store import HistoryStore
from tests.cli.conftest import Spawn
from tests.terminal import CONTROLLING_TERMINAL, ENTER, Terminal

NUM_ROUNDS, NUM_AT_ONCE = 2, 4
CHAT = (
    CONTROLLING_TERMINAL
    + """
from kimi_mlx.cli.chat.chat_history import ChatHistory
from kimi_mlx.cli.chat.options import HistoryOptions
from kimi_mlx.cli.chat.repl import run_repl
from kimi_mlx.cli.chat.repl_state import ReplState
from tests.fakes import conversation_of
conversation = conversation_of(" ".join(map(str, range(5000))), pause_s=0.01)
history = ChatHistory.open(HistoryOptions())
history.attach(conversation, None)
run_repl(ReplState(conversation, history=history))
"""
)


def shown_answer(terminal: Terminal) -> str:
    """Return the numbers that a plain terminal shows after the question."""
    found = re.search(r"\n(0 1 2 [\d ]*)", terminal.text)
    assert found is not None, terminal.text
    return found[1]


@pytest.mark.slow
def test_what_was_shown_is_kept(spawn: Spawn, tmp_path: Path) -> None:
    """Kill 8 chats on one history, four at a time, at random moments within the first second of their answers."""
    moments = random.Random(5)
    shown: dict[str, str] = {}
    for number in range(NUM_ROUNDS):
        chats = {f"count {number}.{index}": spawn(CHAT, columns=20000) for index in range(NUM_AT_ONCE)}
        for terminal in chats.values():
            terminal.expect("\n> ")
        for question, terminal in chats.items():
            terminal.send(question + ENTER)
        for terminal in chats.values():
            terminal.expect("\n0 1 2 ")
        for question, terminal in chats.items():
            time.sleep(moments.uniform(0, 1 / NUM_AT_ONCE))
            terminal.signal(signal.SIGKILL)
            assert terminal.wait() == -signal.SIGKILL
            shown[question] = shown_answer(terminal)
    with closing(HistoryStore.open(tmp_path / "data" / "kimi-mlx" / "conversations")) as store:
        assert len(store.conversations()) == NUM_ROUNDS * NUM_AT_ONCE
        for question, text in shown.items():
            asked, answer = store.messages(find_conversation(store, question).number)
            assert asked.message.content == question
            assert answer.is_unfinished
            assert str(answer.message.content).startswith(text), (question, text[-30:])
    assert len(set(map(len, shown.values()))) > NUM_ROUNDS  # the moments differ
