"""Serving a checkpoint without a chat template or without a tokenizer: plain completions work, chat is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import openai
import pytest

from kimi_mlx.session.session import Session
from kimi_mlx.text.tokenizer import Tokenizer
from tests.fakes import KIMI_MINI
from tests.server.running_server import serving

TEXT = "Two boats and a"


def test_without_a_chat_template(session: Session, tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("*.safetensors", "chat_template.jinja")
    folder = Path(shutil.copytree(KIMI_MINI, tmp_path / "model", ignore=ignore))
    with (
        serving(session, folder=folder) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        assert client.completions.create(model="default", prompt=TEXT, max_tokens=4).choices[0].text
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            client.chat.completions.create(model="default", messages=[{"role": "user", "content": "Hello"}])


def test_without_a_tokenizer(session: Session, tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("*.safetensors", "chat_template.jinja", "tiktoken.model", "tokenizer_config.json")
    folder = Path(shutil.copytree(KIMI_MINI, tmp_path / "model", ignore=ignore))
    tokenizer = Tokenizer.load(KIMI_MINI)
    with (
        serving(session, folder=folder) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        answer = client.completions.create(model="default", prompt=tokenizer.encode(TEXT), max_tokens=4)
        ids = [int(id) for id in answer.choices[0].text.split()]
        assert len(ids) == 4
        with serving(session) as whole, openai.OpenAI(base_url=f"{whole.url}/v1", api_key="any") as other:
            expected = other.completions.create(model="default", prompt=TEXT, max_tokens=4).choices[0].text
        assert tokenizer.decode(ids) == expected
        with pytest.raises(openai.BadRequestError, match="has no tokenizer"):
            client.completions.create(model="default", prompt=TEXT, max_tokens=4)
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            client.chat.completions.create(model="default", messages=[{"role": "user", "content": "Hello"}])
