"""Measure exact match per task of the exported model: `python -m scripts.mini.evaluate FOLDER COUNT`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx

from kimi_mlx.text.tokenizer import Tokenizer
from scripts.mini.dialogues import Dialogue, generate
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


class Evaluator:
    """Runs dialogues through mlx-lm's `deepseek_v3` with the shipped weights."""

    def __init__(self, folder: Path):
        self._model = load_model(folder)
        self._tokenizer = Tokenizer.load(folder)
        self._renderer = Renderer(self._tokenizer)

    def first_mismatch(self, dialogue: Dialogue) -> str | None:
        """Return a description of the model's first wrong token, or None if all answers are correct.

        One pass over the expected text is enough: up to the first mismatch, greedy decoding sees the same tokens.
        """
        row = self._renderer.render(dialogue)
        logits = self._model(mx.array([row.ids]))
        likeliest: Any = mx.argmax(logits[0], axis=-1).tolist()
        for position in range(1, len(row.ids)):
            if row.weights[position] and likeliest[position - 1] != row.ids[position]:
                before = self._tokenizer.decode(row.ids[max(0, position - SHOWN_TOKENS) : position])
                written, expected = likeliest[position - 1], row.ids[position]
                decode = self._tokenizer.decode
                return f"{before} >> {decode([written])!r}, not {decode([expected])!r}"
        return None

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

    config = json.loads((folder / "config.json").read_text())
    group_size, bits = config["quantization"]["group_size"], config["quantization"]["bits"]
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    weights: list[tuple[str, mx.array]] = []
    for name, value in tensors.items():
        base = name.removesuffix("weight")
        if f"{base}scales" in tensors and name.endswith("weight"):
            value = mx.dequantize(value, tensors[f"{base}scales"], tensors[f"{base}biases"], group_size, bits)
        if not name.endswith((".scales", ".biases")):
            weights.append((name, value))
    model = Model(ModelArgs.from_dict(config))
    model.load_weights(weights, strict=True)
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
