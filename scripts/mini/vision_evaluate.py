"""Measure exact match per task of kimi-mini-vl: `python -m scripts.mini.vision_evaluate FOLDER COUNT`.

Pictures go through the whole of kimi-mlx: PNG file, preprocessing, chat template, vision tower, text model.
"""

from __future__ import annotations

import base64
import io
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
from PIL import Image

import kimi_mlx
from scripts.mini.dialogues import Dialogue, generate
from scripts.mini.evaluate import SHOWN_TOKENS, Score
from scripts.mini.picture_dialogues import TEXT_FIRST_SHARE, renamed
from scripts.mini.pictures import draw
from scripts.mini.render import Renderer
from scripts.mini.scenes import GRIDS, Scene, make_scene

# Name of the row -> kind of scene and task.
PICTURE_CASES: dict[str, tuple[str, str]] = {
    "name color, shape and number": ("same", "what"),
    "count up to five": ("same", "count"),
    "color": ("same", "color"),
    "side": ("side", "side"),
    "side of one of two shapes": ("pair", "side"),
    "name two shapes": ("pair", "what"),
    "number of two digits": ("number", "number"),
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


def png(scene: Scene) -> bytes:
    """Return the picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(draw(scene.picture)).save(buffer, "PNG")
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

    def picture_mismatch(self, scene: Scene, task: str, rng: Random) -> str | None:
        """Return a description of the first wrong token of the answer about a picture, or None if it is correct."""
        exchange, thinking = scene.exchanges[task], rng.random() < 0.5
        message = image_message(data_url(png(scene)), exchange.user)
        if rng.random() < TEXT_FIRST_SHARE:
            message["content"].reverse()
        prompt = self._chat.prompt([message], thinking=thinking)
        (image,) = prompt.images
        thought = [exchange.thought, "</think>"] if thinking else []
        answer = self._renderer.encode([*thought, exchange.answer, "<|im_end|>"])
        inputs = {"pixel_values": mx.array(image.patches), "grid_thw": mx.array([image.grid])}
        return self._mismatch([*prompt.ids, *answer], range(len(prompt.ids), len(prompt.ids) + len(answer)), **inputs)

    def text_mismatch(self, dialogue: Dialogue) -> str | None:
        """Return a description of the first wrong token of a dialogue's answers, or None if all are correct."""
        row = self._renderer.render(dialogue)
        return self._mismatch(row.ids, [index for index, weight in enumerate(row.weights) if index and weight])

    def _mismatch(self, ids: list[int], supervised: Iterable[int], **inputs: mx.array) -> str | None:
        """Compare the likeliest tokens with the expected ones.

        One pass over the expected text is enough: up to the first mismatch, greedy decoding sees the same tokens.
        """
        logits = self._model(mx.array([ids]), **inputs)
        likeliest: Any = mx.argmax(logits[0], axis=-1).tolist()
        for position in supervised:
            if likeliest[position - 1] != ids[position]:
                before = self._chat.decode(ids[max(0, position - SHOWN_TOKENS) : position])
                written, expected = (self._chat.decode([token]) for token in (likeliest[position - 1], ids[position]))
                return f"{before} >> {written!r}, not {expected!r}"
        return None

    def score_pictures(self, kind: str, task: str, rng: Random, count: int) -> Score:
        """Return the score of `count` new pictures."""
        score = Score()
        while score.total < count:
            scene = make_scene(rng, rng.choice(GRIDS), kind)
            if task in scene.exchanges:
                score.add(self.picture_mismatch(scene, task, rng))
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
        name: evaluator.score_pictures(kind, task, Random(f"{seed} {name}"), count)
        for name, (kind, task) in PICTURE_CASES.items()
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
