"""The KV cache of conversations that are changed or continued: only new tokens are processed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.engine.events import Finished, Statistics
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.chat_model import ChatEvent, ChatOptions
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.session import SessionOptions
from tests.fakes import KIMI_MINI, chat_model_of

LONG = " ".join(f"Section {number} has code {number * 7}." for number in range(60))


def statistics_of(events: Iterator[ChatEvent]) -> Statistics:
    *_, end = events
    assert isinstance(end, Finished)
    return end.statistics


@pytest.mark.slow
def test_undo_and_retry_reuse_the_beginning() -> None:
    with closing(LocalSession(SessionOptions(KIMI_MINI))) as session:
        options = ChatOptions(max_tokens=4, template_kwargs={"thinking": False})
        conversation = Conversation(chat_model_of(session, ChatTokenizer.load(KIMI_MINI)), options)
        first = statistics_of(conversation.ask(LONG))
        statistics_of(conversation.ask("Hello"))
        conversation.undo()
        other = statistics_of(conversation.ask("What are you?"))
        assert other.cached_tokens >= first.prompt_tokens
        again = statistics_of(conversation.retry())
        assert again.cached_tokens >= other.prompt_tokens - 1


@pytest.mark.slow
def test_a_continued_conversation_uses_the_cache_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))

    def ask(*arguments: str) -> dict[str, int]:
        command = [sys.executable, "-m", "kimi_mlx", "chat", "--json", "--cache-dir", str(tmp_path / "cache")]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["statistics"]

    first = ask("-p", LONG)
    assert first["cached_tokens"] == 0
    second = ask("--continue", "-p", "What are you?")
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert second["cached_tokens"] >= first["prompt_tokens"] - 256 - 20
