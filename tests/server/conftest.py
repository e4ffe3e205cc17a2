"""Fixtures: one session with kimi-mini and one server, shared by all tests of the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import mlx.core as mx
import openai
import pytest

from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import Session, SessionOptions
from tests.fakes import KIMI_MINI
from tests.server.running_server import RunningServer, serving


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    mx.set_default_device(mx.cpu)  # pyright: ignore[reportArgumentType]
    with closing(open_session(SessionOptions(KIMI_MINI))) as opened:
        yield opened


@pytest.fixture(scope="session")
def running(session: Session) -> Iterator[RunningServer]:
    with serving(session) as server:
        yield server


@pytest.fixture
def client(running: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as opened:
        yield opened
