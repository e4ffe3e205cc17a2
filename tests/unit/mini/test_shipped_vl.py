"""kimi-mini-vl in the package: complete, small, and it sees."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kimi_mlx.model.config import load_config
from kimi_mlx.text.template import ChatTemplate
from kimi_mlx.text.tokenizer import Tokenizer
from scripts.mini.example import PATH, TWO_RED_CIRCLES
from scripts.mini.export import generation_config
from scripts.mini.picture_dialogues import picture_dialogue
from scripts.mini.pictures import draw
from scripts.mini.render import Renderer
from scripts.mini.scenes import GRIDS, make_scene
from scripts.mini.tasks import Exchange
from scripts.mini.vision_evaluate import PICTURE_CASES, TEXT_CASES, Evaluator, data_url, image_message
from scripts.mini.vision_export import MAX_BYTES, SHIPPED, preprocessor_config, vision_model_config

FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tiktoken.model",
    "tokenizer_config.json",
)
DOCS = Path(__file__).parents[3] / "docs" / "kimi-mini-vl.md"


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(SHIPPED)


def test_the_folder_is_complete_and_small():
    assert sorted(path.name for path in SHIPPED.iterdir()) == sorted(FILES)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < MAX_BYTES


def test_the_configuration_equals_that_of_the_training():
    tokenizer = Tokenizer.load(SHIPPED)
    config = vision_model_config(tokenizer.vocab_size)
    assert json.loads((SHIPPED / "config.json").read_text()) == config
    assert json.loads((SHIPPED / "generation_config.json").read_text()) == generation_config(tokenizer.vocab_size)
    assert json.loads((SHIPPED / "preprocessor_config.json").read_text()) == preprocessor_config()
    assert config["media_placeholder_token_id"] == tokenizer.special_tokens["<|media_pad|>"]
    vision = load_config(SHIPPED).vision
    assert vision is not None
    assert vision.head_dim == 72  # as in Kimi K2.5


def test_the_picture_of_the_documentation_is_the_drawn_one():
    with Image.open(PATH) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), draw(TWO_RED_CIRCLES))


@pytest.mark.parametrize("thinking", [True, False])
def test_it_answers_the_question_of_the_documentation(evaluator: Evaluator, thinking: bool):
    exchange = Exchange("What do you see?", "Look at the picture.", "Two red circles.")
    message = image_message(data_url(PATH.read_bytes()), exchange.user)
    assert evaluator.answer_mismatch(message, exchange, thinking) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.sweep if at % 2 else ()) for at, name in enumerate(PICTURE_CASES)]
)
def test_it_answers_about_new_pictures(evaluator: Evaluator, name: str):
    assert evaluator.score_pictures(PICTURE_CASES[name], Random(f"shipped {name}"), 4).num_correct >= 3


@pytest.mark.slow
def test_it_still_talks_and_finds_codes(evaluator: Evaluator):
    for name in ("small talk", "retrieval, up to 128 tokens"):
        task, max_tokens = TEXT_CASES[name]
        assert evaluator.score_texts(task, max_tokens, Random(f"shipped {name}"), 4).num_correct >= 3


def test_training_rows_have_the_ids_of_the_chat_template():
    tokenizer = Tokenizer.load(SHIPPED)
    template, renderer, rng = ChatTemplate.load(SHIPPED), Renderer(tokenizer), Random(1)
    pad = renderer.media_pad
    for _ in range(60):
        scene = make_scene(rng, rng.choice(GRIDS))
        dialogue = picture_dialogue(scene, 1, rng)
        thinking: dict[str, Any] = {} if dialogue.thinking else {"thinking": False}
        row = renderer.render(dialogue)
        prompt = template.encode(tokenizer, dialogue.messages[: dialogue.first_supervised], **thinking)
        assert row.ids[: len(prompt)] == prompt
        assert row.ids.count(pad) == 1
        longer = renderer.render(picture_dialogue(scene, 24, Random(2)))
        assert longer.ids.count(pad) == 24


def test_model_card_and_documentation_have_the_same_table():
    rows = [row for row in (SHIPPED / "README.md").read_text().splitlines() if row.startswith("| ")]
    assert len(rows) > len(PICTURE_CASES) + len(TEXT_CASES)
    assert all(row in DOCS.read_text().splitlines() for row in rows)
    for name in (*PICTURE_CASES, *TEXT_CASES):
        assert any(re.match(rf"\| {re.escape(name)} \| \d+ of \d+ \| \d+% \|", row) for row in rows), name
