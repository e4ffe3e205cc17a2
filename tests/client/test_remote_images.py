"""Images in a chat with a server: the same messages as with a model of this process, and their progress."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.client.address import parse_address
from kimi_mlx.client.remote import RemoteChatModel
from kimi_mlx.engine.events import Encoded
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.chat_model import ChatEvent, ChatModel, ChatOptions
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.session.local_chat_model import LocalChatModel
from kimi_mlx.session.model_status import ModelDeployment
from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.text.messages import Message
from tests.fakes import KIMI_MINI
from tests.server.running_server import serving

FOLDER = KIMI_MINI.with_name("kimi-mini-vl")
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "two-red-circles.png"
OPTIONS = ChatOptions(sampling={"temperature": 0})


def talk(model: ChatModel) -> tuple[Sequence[Message], list[ChatEvent]]:
    """Return a conversation about a picture, and its events."""
    conversation = Conversation(model, OPTIONS)
    picture = {"type": "image", "image": PICTURE.read_bytes()}
    events = list(conversation.ask([picture, {"type": "text", "text": "What do you see?"}]))
    events += conversation.ask("How many?")
    return conversation.messages, events


@pytest.mark.slow
def test_a_conversation_about_a_picture() -> None:
    deployment = ModelDeployment("kimi-mini-vl", "hybrid", None, load_config(FOLDER))
    with closing(open_session(SessionOptions(FOLDER))) as session:
        local = LocalChatModel(session, ChatTokenizer.load(FOLDER), deployment)
        with serving(session, folder=FOLDER) as server, closing(RemoteChatModel(parse_address(server.url))) as remote:
            assert remote.image_error is None
            messages, events = talk(remote)
            progress = [event for event in events if isinstance(event, Encoded)]
            assert progress[-1].done == progress[-1].total
            assert "circles" in str(messages[1].content)
            assert messages == talk(local)[0]
            data = PICTURE.read_bytes()
            sizes = [
                [chunk.image.num_tokens for chunk in model.prepare_media("image", data, "x")]
                for model in (local, remote)
            ]
            assert sizes[0] == sizes[1]
            counts = {model.count_tokens(messages, OPTIONS) for model in (local, remote)}
            assert len(counts) == 1
