"""Fixtures: one session with kimi-mini and one server, shared by all tests of the server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.server.running_server import RunningServer


@pytest.fixture
def client(running: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as opened:
        yield opened
