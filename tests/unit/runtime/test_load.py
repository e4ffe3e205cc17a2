"""Loading with MLX's own group, and of checkpoints without a chat template or without a tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import kimi_mlx
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Token
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import TextError, UsageError
from kimi_mlx.model.decoder import Model
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.runtime.generation_config import MAX_TOKENS_KEY
from kimi_mlx.runtime.prompt import Prompt
from kimi_mlx.session.local_chat_model import make_request
from tests.fakes import KIMI_MINI

HELLO = [{"role": "user", "content": "Hello"}]


def copy_without(folder: Path, *names: str) -> Path:
    """Copy kimi-mini without some of its files."""
    return Path(shutil.copytree(KIMI_MINI, folder / "model", ignore=shutil.ignore_patterns(*names)))


def generated_ids(model: Model, prompt: tuple[int, ...]) -> list[int]:
    return [event.id for event in Engine(model).generate(Request(prompt, max_tokens=5)) if isinstance(event, Token)]


def test_a_group_of_mlx_with_one_rank_loads_the_whole_model() -> None:
    model, _ = kimi_mlx.load("kimi-mini", group=mx.distributed.init())
    alone, _ = kimi_mlx.load("kimi-mini")
    assert generated_ids(model, (5, 6, 7)) == generated_ids(alone, (5, 6, 7))


def test_without_a_chat_template_text_works_and_messages_are_refused(tmp_path: Path) -> None:
    folder = copy_without(tmp_path, "chat_template.jinja")
    _, tokenizer = kimi_mlx.load(folder)
    assert (tokenizer.has_tokenizer, tokenizer.has_chat_template) == (True, False)
    assert tokenizer.decode(tokenizer.encode("A tide.")) == "A tide."
    with pytest.raises(TextError, match="has no chat template") as raised:
        tokenizer.apply_chat_template(HELLO)
    assert "/v1/completions" in str(raised.value.hint)


def test_without_a_tokenizer_ids_work_and_text_is_refused(tmp_path: Path) -> None:
    folder = copy_without(tmp_path, "tiktoken.model", "chat_template.jinja", "tokenizer_config.json")
    model, tokenizer = kimi_mlx.load(folder)
    assert (tokenizer.has_tokenizer, tokenizer.has_chat_template) == (False, False)
    ids = generated_ids(model, (5, 6, 7))
    assert ids == generated_ids(kimi_mlx.load("kimi-mini")[0], (5, 6, 7))
    assert tokenizer.decode(ids) == "".join(f"{id} " for id in ids)
    assert tokenizer.stop_ids == {json.loads((folder / "config.json").read_text())["eos_token_id"], 1538}
    with pytest.raises(TextError, match="has no tokenizer") as raised:
        tokenizer.encode("A tide.")
    assert "token ids" in str(raised.value.hint)
    with pytest.raises(TextError, match="has no chat template"):
        tokenizer.apply_chat_template(HELLO)


def test_a_chat_template_needs_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(copy_without(tmp_path, "tiktoken.model", "tokenizer_config.json"))
    with pytest.raises(TextError, match="has no tokenizer"):
        tokenizer.apply_chat_template(HELLO)


def test_only_kimi_mini_limits_its_answers(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(KIMI_MINI)
    assert make_request(tokenizer, Prompt([1])).max_tokens == tokenizer.max_tokens == 512
    assert make_request(tokenizer, Prompt([1]), max_tokens=9000).max_tokens == 9000
    folder = copy_without(tmp_path, "model.safetensors")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"max_new_tokens": 7, "max_length": 8}))  # keys of real models
    assert ChatTokenizer.load(folder).max_tokens is None
    path.write_text(json.dumps({MAX_TOKENS_KEY: "many"}))
    with pytest.raises(TextError, match=r"is 'many', not a whole number above 0"):
        ChatTokenizer.load(folder)


@pytest.mark.parametrize("group", [object(), 2, mx.distributed.init])
def test_an_object_that_is_no_group_is_refused(group: Any) -> None:
    with pytest.raises(UsageError, match="not a group"):
        kimi_mlx.load("kimi-mini", group=group)
