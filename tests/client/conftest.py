"""Fixtures: a session with kimi-mini, its server, and both kinds of chat models on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import mlx.core as mx
import pytest

from kimi_mlx.client.address import parse_address
from kimi_mlx.client.remote import RemoteChatModel
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.local_chat_model import LocalChatModel
from kimi_mlx.session.model_status import ModelDeployment
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
def remote(running: RunningServer) -> Iterator[RemoteChatModel]:
    with closing(RemoteChatModel(parse_address(running.url))) as model:
        yield model


@pytest.fixture
def local(session: Session) -> LocalChatModel:
    deployment = ModelDeployment("kimi-mini", "hybrid", None, load_config(KIMI_MINI))
    return LocalChatModel(session, ChatTokenizer.load(KIMI_MINI), deployment)
