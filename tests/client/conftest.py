"""Fixtures: a session with kimi-mini, its server, and both kinds of chat models on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from kimi_mlx.client.address import parse_address
from kimi_mlx.client.remote import RemoteChatModel
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.local_chat_model import LocalChatModel
from kimi_mlx.session.model_status import ModelDeployment
from kimi_mlx.session.session import Session
from tests.fakes import KIMI_MINI
from tests.server.running_server import RunningServer


@pytest.fixture
def remote(running: RunningServer) -> Iterator[RemoteChatModel]:
    with closing(RemoteChatModel(parse_address(running.url))) as model:
        yield model


@pytest.fixture
def local(session: Session) -> LocalChatModel:
    deployment = ModelDeployment("kimi-mini", "hybrid", None, load_config(KIMI_MINI))
    return LocalChatModel(session, ChatTokenizer.load(KIMI_MINI), deployment)
