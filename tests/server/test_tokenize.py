"""The tokenizer over HTTP, as in vLLM: both directions, conversations, and errors."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from tests.fakes import KIMI_MINI
from tests.server import raw
from tests.server.running_server import RunningServer

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("text", ["", "The capital of", "¿Qué? 👍\n\tü", "<|im_end|>[EOS]", "a" * 9000])
def test_a_text_survives_both_directions(running: RunningServer, text: str) -> None:
    for options in ({}, {"add_special_tokens": False, "model": "mini"}, {"return_token_strs": True}):
        found = raw.post(running.port, "/tokenize", {"prompt": text, **options})
        assert found["count"] == len(found["tokens"])
        assert found["max_model_len"] == raw.post(running.port, "/tokenize", {"prompt": "a"})["max_model_len"]
        assert raw.post(running.port, "/detokenize", {"tokens": found["tokens"]}) == {"prompt": text}
        assert (found["token_strs"] is not None) == ("return_token_strs" in options)
        if found["token_strs"] and text.isascii():
            assert "".join(found["token_strs"]) == text
    assert found["tokens"] == ChatTokenizer.load(KIMI_MINI).encode(text)


@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL]}, {"chat_template_kwargs": {"thinking": False}}])
def test_the_tokens_of_a_conversation_are_those_of_its_prompt(
    client: openai.OpenAI, running: RunningServer, fields: dict[str, Any]
) -> None:
    found = raw.post(running.port, "/tokenize", {"messages": HI, **fields})
    answer = raw.post(running.port, "/v1/chat/completions", {"messages": HI, "max_tokens": 1, **fields})
    assert found["count"] == answer["usage"]["prompt_tokens"]
    text = raw.post(running.port, "/detokenize", {"tokens": found["tokens"]})["prompt"]
    assert "hi" in text
    shorter = raw.post(running.port, "/tokenize", {"messages": HI, "add_generation_prompt": False, **fields})["tokens"]
    assert found["tokens"][: len(shorter)] == shorter
    assert len(shorter) < found["count"]


def test_a_conversation_whose_last_message_is_continued(running: RunningServer) -> None:
    messages = [*HI, {"role": "assistant", "content": "Hello"}]
    found = raw.post(running.port, "/tokenize", {"messages": messages, "continue_final_message": True})
    partial = [HI[0], {**messages[1], "partial": True}]
    answer = raw.post(running.port, "/v1/chat/completions", {"messages": partial, "max_tokens": 1})
    assert found["count"] == answer["usage"]["prompt_tokens"]
    assert raw.post(running.port, "/detokenize", {"tokens": found["tokens"]})["prompt"].endswith("Hello")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HI, "continue_final_message": True}, "messages[0]"),
        ("/tokenize", {"messages": HI, "chat_template": "x"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [5, 999_999]}, "tokens[1]"),
        ("/detokenize", {"tokens": [5, -1]}, "tokens[1]"),
    ],
)
def test_errors_name_the_field(running: RunningServer, path: str, body: dict[str, Any], param: str) -> None:
    response = raw.request(running.port, "POST", path, json.dumps(body).encode())
    assert (response.status, response.error["param"]) == (400, param)


def test_the_configuration_of_the_tokenizer(running: RunningServer) -> None:
    info = json.loads(raw.request(running.port, path="/tokenizer_info").body)
    assert info["eos_token"]
    assert info["chat_template"] == (KIMI_MINI / "chat_template.jinja").read_text()
