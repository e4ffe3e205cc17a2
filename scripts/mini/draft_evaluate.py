"""Tokens per step with the shipped draft model, by task: `python -m scripts.mini.draft_evaluate [COUNT]`."""

from __future__ import annotations

import sys
from random import Random

import mlx.core as mx
import numpy as np

from kimi_mlx.text.tokenizer import Tokenizer
from scripts.mini.dialogues import Dialogue, generate
from scripts.mini.draft_batches import to_arrays
from scripts.mini.draft_data import ROW_LENGTH, TARGET, Sample, Target, samples_of
from scripts.mini.draft_export import load_draft
from scripts.mini.draft_model import draft
from scripts.mini.model import Parameters
from scripts.mini.render import Renderer

SHIPPED = TARGET.parent / "kimi-mini-draft"
NUM_DRAFTED = (3, 5, 7)
MAX_TOKENS = 160

# Name of the row -> tasks of its dialogues.
CASES: dict[str, tuple[str, ...]] = {
    "chat": ("chat", "arithmetic", "several"),
    "code (drawing an SVG)": ("pelican",),
    "copying": ("copy",),
    "tools": ("tools",),
    "retrieval": ("retrieval",),
}


def tokens_per_step(right: np.ndarray, sample: Sample, num_drafted: int) -> tuple[int, int]:
    """Return the numbers of tokens and of steps in which an answer is written, after its first token.

    Args:
        right: (steps, L), whether the token that is drafted in a step at a row is the answer's.
        sample: dialogue of these rows.
        num_drafted: number of drafted tokens per step.
    """
    known, steps, last = sample.answer_start, 0, len(sample.ids) - 1
    while known < last:
        most = min(num_drafted, last - known - 1)
        hits = [bool(right[step, known - 1 + step]) for step in range(most)]
        known += 1 + (hits.index(False) if False in hits else most)
        steps += 1
    return last - sample.answer_start, steps


def evaluate(target: Target, parameters: Parameters, drafted: np.ndarray, samples: list[Sample]) -> list[float]:
    """Return the mean number of tokens per step for each of NUM_DRAFTED."""
    totals = np.zeros((len(NUM_DRAFTED), 2))
    for sample in samples:
        batch = to_arrays([[sample]], target.embedding, target.head, drafted)
        scores = draft(parameters, batch, target.shape, max(NUM_DRAFTED))
        following = np.array([*sample.ids[2:], *[-1] * (ROW_LENGTH + 2 - len(sample.ids))])
        right = np.stack([drafted[np.array(mx.argmax(step[0], axis=-1))] == following for step in scores])
        totals += [tokens_per_step(right, sample, number) for number in NUM_DRAFTED]
    return (totals[:, 0] / np.maximum(totals[:, 1], 1)).tolist()


def report(count: int, seed: str = "draft evaluation") -> str:
    """Return the table of all cases, as Markdown."""
    target, renderer = Target(), Renderer(Tokenizer.load(TARGET))
    parameters, drafted = load_draft(SHIPPED)
    header = " | ".join(f"{number} drafted" for number in NUM_DRAFTED)
    lines = [f"| answers of kimi-mini | number | {header} |", "| --- | --: |" + " --: |" * len(NUM_DRAFTED)]
    for name, tasks in CASES.items():
        rng = Random(f"{seed} {name}")
        dialogues: list[Dialogue] = [generate(rng.choice(tasks), rng, MAX_TOKENS) for _ in range(count)]
        rows = [row for row in map(renderer.render, dialogues) if len(row.ids) <= ROW_LENGTH]
        samples = [sample for row in rows for sample in samples_of(target, [[row]])]
        rates = " | ".join(f"{rate:.2f}" for rate in evaluate(target, parameters, drafted, samples))
        lines.append(f"| {name} | {len(samples)} | {rates} |")
    return "\n".join(lines)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    print(report(int(sys.argv[1]) if len(sys.argv) > 1 else 60))
