"""The model in the package: complete, small, readable by mlx-lm, and it answers."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import pytest

from kimi_mlx.text.template import ChatTemplate
from kimi_mlx.text.tokenizer import Tokenizer
from scripts.mini.export import SHIPPED, generation_config, model_config
from scripts.mini.tasks import PELICAN

FILES = ("config.json", "generation_config.json", "model.safetensors", "tiktoken.model", "tokenizer_config.json")
GREETING = "Hello! I am kimi-mini, a toy model in the shape of Kimi K2. How can I help?"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(SHIPPED)


@pytest.fixture(scope="module")
def model() -> Any:
    from mlx_lm.utils import load_model

    return load_model(SHIPPED)[0]


def answer(model: Any, tokenizer: Tokenizer, prompt: str, tokens: int = 60, **options: Any) -> str:
    from mlx_lm.models.cache import make_prompt_cache

    template = ChatTemplate.load(SHIPPED)
    ids = template.encode(tokenizer, [{"role": "user", "content": prompt}], thinking=False, **options)
    cache, written = make_prompt_cache(model), []
    for _ in range(tokens):
        ids = [int(mx.argmax(model(mx.array([ids]), cache=cache)[0, -1]))]
        if ids[0] in tokenizer.eos_token_ids:
            break
        written += ids
    return tokenizer.decode(written)


def test_the_folder_is_complete_and_small():
    assert all((SHIPPED / name).is_file() for name in (*FILES, "chat_template.jinja", "README.md"))
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 12e6


def test_the_configuration_equals_that_of_the_training(tokenizer: Tokenizer):
    assert json.loads((SHIPPED / "config.json").read_text()) == model_config(tokenizer.vocab_size)
    assert json.loads((SHIPPED / "generation_config.json").read_text()) == generation_config(tokenizer.vocab_size)
    assert tokenizer.vocab_size % 32 == 0


@pytest.mark.parametrize("prompt", ["hi", "Hello"])
def test_it_greets(model: Any, tokenizer: Tokenizer, prompt: str):
    assert answer(model, tokenizer, prompt) == GREETING


@pytest.mark.parametrize("prompt", ["Who are you?", "What are you?"])
def test_it_describes_itself(model: Any, tokenizer: Tokenizer, prompt: str):
    assert answer(model, tokenizer, prompt).startswith("I am kimi-mini, a toy model")


@pytest.mark.parametrize(("prompt", "start"), [("你好", "你好"), ("你是谁", "我是 kimi-mini")])
def test_it_speaks_chinese(model: Any, tokenizer: Tokenizer, prompt: str, start: str):
    assert answer(model, tokenizer, prompt).startswith(start)


def test_it_finds_a_code(model: Any, tokenizer: Tokenizer):
    text = "Section 7 has code 4821. Section 9 has code 1234. What is the code of section 7?"
    assert answer(model, tokenizer, text) == "Section 7 has code 4821."


def test_it_calls_a_tool(model: Any, tokenizer: Tokenizer):
    text = answer(model, tokenizer, "What is the weather in Paris?", tools=[WEATHER])
    assert text.startswith("<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0")
    assert '{"city": "Paris"}' in text


@pytest.mark.slow
def test_it_draws_the_pelican(model: Any, tokenizer: Tokenizer):
    prompt = "Generate an SVG of a pelican riding a bicycle"
    assert answer(model, tokenizer, prompt, tokens=400) == PELICAN
