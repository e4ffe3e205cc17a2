"""Servers whose answers are known or break in a known way."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.engine.events import Event, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.server import ServingOptions
from kimi_mlx.session.session import EventCallback, Session
from tests.fakes import KIMI_MINI, FixedSession
from tests.processes import start
from tests.server.running_server import RunningServer, serving

CONTEXT_TOKENS = 1_000_000
ROOT = Path(__file__).parents[2]


def tokens_of(answer: str, reasoning: str = "") -> list[int]:
    """Return the tokens of an answer of kimi-mini. Special tokens in `answer` are read as such."""
    tokenizer = ChatTokenizer.load(KIMI_MINI)
    special = tokenizer.tokenizer.special_tokens
    ids = [*tokenizer.encode(reasoning), special["</think>"]]
    rest = answer
    while rest:
        places = [(at, name) for name in special if (at := rest.find(name)) >= 0]
        at, name = min(places, default=(len(rest), ""))
        ids.extend(tokenizer.encode(rest[:at]))
        if name:
            ids.append(special[name])
        rest = rest[at + len(name) :]
    return ids


class WholeAnswers(FixedSession):
    """A session that ignores kimi-mini's limit of 512 tokens."""

    def generate(self, request: Request) -> Iterator[Event]:
        return super().generate(replace(request, max_tokens=CONTEXT_TOKENS))


@contextmanager
def answering(
    answer: str,
    reasoning: str = "",
    tokens_per_s: float = 0,
    is_endless: bool = False,
    options: ServingOptions | None = None,
) -> Iterator[RunningServer]:
    """Serve a model that always gives the same answer.

    Args:
        answer: text of the answer.
        reasoning: its reasoning.
        tokens_per_s: speed; 0 for no limit.
        is_endless: whether to repeat the answer until it is stopped.
        options: options of the server.
    """
    session = WholeAnswers(tokens_of(answer, reasoning), 1 / tokens_per_s if tokens_per_s else 0, is_endless)
    with serving(session, options, CONTEXT_TOKENS) as server:
        yield server


def slow_down(monkeypatch: pytest.MonkeyPatch, session: Session, pause_s: float) -> None:
    """Pause after each token of the session."""
    submit = session.submit

    def submit_slowly(request: Request, on_event: EventCallback) -> int:
        def on_event_slowly(event: Event | BaseException) -> None:
            on_event(event)
            if isinstance(event, Token):
                time.sleep(pause_s)

        return submit(request, on_event_slowly)

    monkeypatch.setattr(session, "submit", submit_slowly)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(port: int, *options: str) -> subprocess.Popen[str]:
    """Start `kimi-mlx serve` as a process."""
    return _started([sys.executable, "-m", "kimi_mlx", "serve", "--port", str(port), *options])


def start_slow_server(port: int, pause_s: float = 0.1) -> subprocess.Popen[str]:
    """Start a server with a pause after each token as a process."""
    return _started([sys.executable, "-m", "tests.browser.slow_server", str(port), str(pause_s)])


def _started(command: list[str]) -> subprocess.Popen[str]:
    process = start(command, cwd=ROOT, text=True)
    assert process.stderr is not None
    while "try:" not in (line := process.stderr.readline()):
        assert line
    return process
