"""Training rows have the same ids as the chat template."""

from __future__ import annotations

from itertools import islice

import pytest

from kimi_mlx.text.template import ChatTemplate
from kimi_mlx.text.tokenizer import Tokenizer
from scripts.mini.batches import TOKENS_PER_STEP, make_batch
from scripts.mini.dialogues import stream
from scripts.mini.export import SHIPPED
from scripts.mini.render import Renderer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(SHIPPED)


def test_every_prompt_equals_the_chat_template(tokenizer: Tokenizer):
    template, renderer = ChatTemplate.load(SHIPPED), Renderer(tokenizer)
    compared = 0
    for dialogue in islice(stream("template", part=1, max_tokens=160), 150):
        row = renderer.render(dialogue)
        thinking = {} if dialogue.thinking else {"thinking": False}
        for index in range(dialogue.first_supervised, len(dialogue.messages)):
            if dialogue.messages[index]["role"] != "assistant":
                continue
            prompt = template.encode(tokenizer, dialogue.messages[:index], tools=dialogue.tools or None, **thinking)
            assert row.ids[: len(prompt)] == prompt
            assert row.weights[len(prompt) - 1] == 0 < row.weights[len(prompt)]
            compared += 1
    assert compared > 150


def test_only_answers_count_and_they_end_the_turn(tokenizer: Tokenizer):
    renderer, end = Renderer(tokenizer), tokenizer.special_tokens["<|im_end|>"]
    for dialogue in islice(stream("weights", part=1, max_tokens=160), 50):
        row = renderer.render(dialogue)
        assert row.ids[-1] == end
        assert row.weights[-1] > 0
        assert row.weights[0] == 0
        answers = sum(message["role"] == "assistant" for message in dialogue.messages)
        ends = sum(token == end and weight > 0 for token, weight in zip(row.ids, row.weights, strict=True))
        assert ends == answers


@pytest.mark.parametrize("part", [0, 1, 2])
def test_batches_are_reproducible_and_packed(tokenizer: Tokenizer, part: int):
    renderer, pad = Renderer(tokenizer), tokenizer.vocab_size - 1
    batch = make_batch(renderer, pad, "seed", step=5, rank=0, part=part)
    again = make_batch(renderer, pad, "seed", step=5, rank=0, part=part)
    other = make_batch(renderer, pad, "seed", step=5, rank=1, part=part)
    tokens = batch.arrays["tokens"]
    assert tokens.size == TOKENS_PER_STEP
    assert tokens.tolist() == again.arrays["tokens"].tolist()
    assert tokens.tolist() != other.arrays["tokens"].tolist()
    assert batch.row_length == other.row_length
    assert batch.tokens > 0.8 * TOKENS_PER_STEP
    flat, positions = tokens.reshape(-1), batch.arrays["positions"]
    assert flat[positions + 1].tolist() == batch.arrays["targets"].tolist()
