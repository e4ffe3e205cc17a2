"""Measure exact match per task of the exported model: `python -m scripts.mini.evaluate FOLDER COUNT`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx

from kimi_mlx.text.tokenizer import Tokenizer
from scripts.mini.dialogues import Dialogue, generate
from scripts.mini.quantize import dequantize
from scripts.mini.render import Renderer

# Name of the row -> task and maximum number of tokens of its dialogues.
CASES: dict[str, tuple[str, int]] = {
    "small talk": ("chat", 160),
    "arithmetic": ("arithmetic", 160),
    "small sums": ("sums", 160),
    "copying": ("copy", 160),
    "tools": ("tools", 160),
    "several turns": ("several", 160),
    "retrieval, up to 128 tokens": ("retrieval", 128),
    "retrieval, up to 256 tokens": ("retrieval", 256),
    "retrieval, up to 512 tokens": ("retrieval", 512),
    "retrieval, up to 1,024 tokens": ("retrieval", 1024),
    "pelican": ("pelican", 320),
}
SHOWN_TOKENS = 80


@dataclass
class Score:
    """Number of correct dialogues, and the first mismatch."""

    num_correct: int = 0
    total: int = 0
    first_mismatch: str = ""

    def add(self, mismatch: str | None) -> None:
        """Count one dialogue, by its first mismatch."""
        self.total += 1
        self.num_correct += mismatch is None
        self.first_mismatch = self.first_mismatch or mismatch or ""

    def __str__(self) -> str:
        return f"{self.num_correct} of {self.total}" if self.total else "-"


def describe_mismatch(tokenizer: Tokenizer, logits: mx.array, ids: list[int], supervised: Iterable[int]) -> str | None:
    """Return a description of the first wrong token, or None if all supervised ones are the likeliest.

    One pass over the expected text is enough: up to the first mismatch, greedy decoding sees the same tokens.

    Args:
        tokenizer: tokenizer of the model.
        logits: (1, length, vocab_size), computed from `ids`.
        ids: expected text with its prompt.
        supervised: positions of the tokens of answers, from 1.
    """
    likeliest: Any = mx.argmax(logits[0], axis=-1).tolist()
    for position in supervised:
        if likeliest[position - 1] != ids[position]:
            before = tokenizer.decode(ids[max(0, position - SHOWN_TOKENS) : position])
            written, expected = (tokenizer.decode([token]) for token in (likeliest[position - 1], ids[position]))
            return f"{before} >> {written!r}, not {expected!r}"
    return None


class Evaluator:
    """Runs dialogues through mlx-lm's `deepseek_v3` with the shipped weights."""

    def __init__(self, folder: Path):
        self._model = load_model(folder)
        self._tokenizer = Tokenizer.load(folder)
        self._renderer = Renderer(self._tokenizer)

    def first_mismatch(self, dialogue: Dialogue) -> str | None:
        """Return a description of the model's first wrong token, or None if all answers are correct."""
        row = self._renderer.render(dialogue)
        return describe_mismatch(self._tokenizer, self._model(mx.array([row.ids])), row.ids, row.supervised)

    def score(self, task: str, max_tokens: int, rng: Random, count: int) -> dict[bool, Score]:
        """Return the scores of `count` dialogues, by whether the dialogue has thinking on."""
        scores = {True: Score(), False: Score()}
        for _ in range(count):
            dialogue = generate(task, rng, max_tokens, questions=1)
            scores[dialogue.thinking].add(self.first_mismatch(dialogue))
        return scores


def load_model(folder: Path) -> Any:
    """Load the exported weights, dequantized: quantized products are slow on the CPU, with the same result."""
    from mlx_lm.models.deepseek_v3 import Model, ModelArgs

    model = Model(ModelArgs.from_dict(json.loads((folder / "config.json").read_text())))
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    model.load_weights(list(dequantize(tensors).items()), strict=True)
    return model


def report(folder: Path, count: int, examples: bool, seed: str = "evaluation") -> str:
    """Return the accuracies as a Markdown table, optionally with one mismatch per task and mode."""
    evaluator, started = Evaluator(folder), time.monotonic()
    lines = ["| task | correct, thinking | correct, instant | together |", "| --- | --: | --: | --: |"]
    mismatches: list[str] = []
    for name, (task, max_tokens) in CASES.items():
        scores = evaluator.score(task, max_tokens, Random(f"{seed} {name}"), count)
        share = sum(score.num_correct for score in scores.values()) / count
        lines.append(f"| {name} | {scores[True]} | {scores[False]} | {share:.0%} |")
        mismatches += [f"{name}: {score.first_mismatch}" for score in scores.values() if score.first_mismatch]
    lines.append(f"\n{count} new dialogues per row; {time.monotonic() - started:.0f} s")
    return "\n".join(lines + (mismatches if examples else []))


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    print(report(Path(sys.argv[1]), int(sys.argv[2]), examples=len(sys.argv) > 3))
