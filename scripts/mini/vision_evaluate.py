"""Measure exact match per task of kimi-mini-vl: `python -m scripts.mini.vision_evaluate FOLDER COUNT`.

Pictures go through the whole of kimi-mlx: PNG file, preprocessing, chat template, vision tower, text model.
"""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
from PIL import Image

import kimi_mlx
from scripts.mini.dialogues import Dialogue, generate
from scripts.mini.evaluate import Score, describe_mismatch
from scripts.mini.picture_dialogues import TEXT_FIRST_SHARE, renamed
from scripts.mini.pictures import Picture, draw, enlarge
from scripts.mini.render import Renderer
from scripts.mini.scenes import GRIDS, Scene, make_scene
from scripts.mini.tasks import Exchange

# Name of the row -> kind of scene, task, and the factor by which the picture is larger than those of the training.
PICTURE_CASES: dict[str, tuple[str, str, int]] = {
    "name color, shape and number": ("same", "what", 1),
    "count up to five": ("same", "count", 1),
    "color": ("same", "color", 1),
    "side": ("side", "side", 1),
    "side of one of two shapes": ("pair", "side", 1),
    "name two shapes": ("pair", "what", 1),
    "number of two digits": ("number", "number", 1),
    "count, in pictures 4 times as large": ("same", "count", 4),
    "number, in pictures 4 times as large": ("number", "number", 4),
}
# Name of the row -> task and maximum number of tokens of its dialogues.
TEXT_CASES: dict[str, tuple[str, int]] = {
    "small talk": ("chat", 160),
    "arithmetic": ("arithmetic", 160),
    "copying": ("copy", 160),
    "tools": ("tools", 160),
    "several turns": ("several", 160),
    "retrieval, up to 128 tokens": ("retrieval", 128),
    "pelican": ("pelican", 320),
}


def png(picture: Picture) -> bytes:
    """Return a picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(draw(picture)).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(file: bytes) -> str:
    """Return the data URL of a PNG file."""
    return "data:image/png;base64," + base64.b64encode(file).decode()


def image_message(url: str, text: str) -> dict[str, Any]:
    """Return a message with a picture and a question, in OpenAI's format."""
    image = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


class Evaluator:
    """Runs dialogues through kimi-mlx with the shipped weights."""

    def __init__(self, folder: Path):
        self._model, self._chat = kimi_mlx.load(folder, dtype="float32")
        self._renderer = Renderer(self._chat.tokenizer)

    def answer_mismatch(self, message: dict[str, Any], exchange: Exchange, thinking: bool) -> str | None:
        """Return a description of the first wrong token of the answer to a message with a picture, or None.

        Args:
            message: the user's message.
            exchange: expected thought and answer.
            thinking: whether the model thinks.
        """
        prompt = self._chat.prompt([message], thinking=thinking)
        (image,) = prompt.images
        assert image.patches is not None
        thought = [exchange.thought, "</think>"] if thinking else []
        answer = self._renderer.encode([*thought, exchange.answer, "<|im_end|>"])
        supervised = range(len(prompt.ids), len(prompt.ids) + len(answer))
        inputs = mx.array(image.patches), mx.array([image.grid])
        ids = [*prompt.ids, *answer]
        return describe_mismatch(self._chat.tokenizer, self._model(mx.array([ids]), None, *inputs), ids, supervised)

    def picture_mismatch(self, scene: Scene, task: str, factor: int, rng: Random) -> str | None:
        """Return a description of the first wrong token of the answer about a scene, or None if it is correct."""
        exchange = scene.exchanges[task]
        message = image_message(data_url(png(enlarge(scene.picture, factor))), exchange.user)
        if rng.random() < TEXT_FIRST_SHARE:
            message["content"].reverse()
        return self.answer_mismatch(message, exchange, thinking=rng.random() < 0.5)

    def text_mismatch(self, dialogue: Dialogue) -> str | None:
        """Return a description of the first wrong token of a dialogue's answers, or None if all are correct."""
        row = self._renderer.render(dialogue)
        return describe_mismatch(self._chat.tokenizer, self._model(mx.array([row.ids])), row.ids, row.supervised)

    def score_pictures(self, case: tuple[str, str, int], rng: Random, count: int) -> Score:
        """Return the score of `count` new pictures."""
        kind, task, factor = case
        score = Score()
        while score.total < count:
            scene = make_scene(rng, rng.choice(GRIDS), kind)
            if task in scene.exchanges:
                score.add(self.picture_mismatch(scene, task, factor, rng))
        return score

    def score_texts(self, task: str, max_tokens: int, rng: Random, count: int) -> Score:
        """Return the score of `count` new dialogues without pictures."""
        score = Score()
        for _ in range(count):
            score.add(self.text_mismatch(renamed(generate(task, rng, max_tokens, questions=1))))
        return score


def report(folder: Path, count: int, examples: bool, seed: str = "evaluation") -> str:
    """Return the accuracies as a Markdown table, optionally with one mismatch per row."""
    evaluator, started = Evaluator(folder), time.monotonic()
    scores = {
        name: evaluator.score_pictures(case, Random(f"{seed} {name}"), count) for name, case in PICTURE_CASES.items()
    } | {
        name: evaluator.score_texts(task, max_tokens, Random(f"{seed} {name}"), count)
        for name, (task, max_tokens) in TEXT_CASES.items()
    }
    lines = ["| task | correct | share |", "| --- | --: | --: |"]
    lines += [f"| {name} | {score} | {score.num_correct / score.total:.0%} |" for name, score in scores.items()]
    lines.append(f"\n{count} new pictures or dialogues per row; {time.monotonic() - started:.0f} s")
    mismatches = [f"{name}: {score.first_mismatch}" for name, score in scores.items() if score.first_mismatch]
    return "\n".join(lines + (mismatches if examples else []))


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    print(report(Path(sys.argv[1]), int(sys.argv[2]), examples=len(sys.argv) > 3))
