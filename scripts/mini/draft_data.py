"""Training data of the draft model: answers that kimi-mini itself would write, with its states.

kimi-mini learned to write the answers of the dialogue generator. So a dialogue is kept if each token of its last answer
is the model's likeliest: greedy decoding then writes the same. That takes one pass over the dialogue.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kimi_mlx.text.tokenizer import Tokenizer
from scripts.mini.architecture import Shape, yarn_inverse_frequencies
from scripts.mini.batches import pack, to_arrays
from scripts.mini.dialogues import stream
from scripts.mini.draft_architecture import LAYER_IDS
from scripts.mini.model import Parameters, attention, feed_forward
from scripts.mini.quantize import dequantize
from scripts.mini.render import Renderer, Row

TARGET = Path(__file__).resolve().parents[2] / "kimi_mlx" / "models" / "kimi-mini"
ROW_LENGTH = 384  # kimi-mini's longest answer, the drawing, has about 300 tokens with its prompt
ROWS = 5
MAX_DIALOGUE_TOKENS = 160


@dataclass
class Sample:
    """A dialogue with its states.

    Args:
        ids: its L token ids.
        answer_start: position of the last answer's first token.
        captured: (L, C * D) float16, inputs of the captured layers.
        final: (L, D) float16, the normed output of the last layer.
    """

    ids: list[int]
    answer_start: int
    captured: np.ndarray
    final: np.ndarray


class Target:
    """kimi-mini with the shipped weights, dequantized."""

    def __init__(self) -> None:
        tensors: Any = mx.load(str(TARGET / "model.safetensors"))
        self.parameters = dequantize(tensors)
        self.embedding = self.parameters["model.embed_tokens.weight"]
        self.head = self.parameters["lm_head.weight"]
        self.shape = Shape(self.head.shape[0])

    def states(self, tokens: mx.array, segments: mx.array) -> tuple[mx.array, mx.array]:
        """Return the captured states (B, L, C * D) and the normed output of the last layer (B, L, D).

        Args:
            tokens: (B, L).
            segments: (B, L), numbers of the dialogues; attention stays inside one.
        """
        p, shape = self.parameters, self.shape
        B, L = tokens.shape
        distance = mx.arange(L)[:, None] - mx.arange(L)[None]
        is_seen = (distance >= 0) & (segments[:, :, None] == segments[:, None, :])
        mask = mx.where(is_seen, 0.0, -1e9)[:, None]
        angles = mx.arange(L)[:, None] * mx.array(yarn_inverse_frequencies(shape.qk_rope_head_dim))
        rope = (mx.cos(angles), mx.sin(angles))
        # Capacity factor at which an expert takes any number of tokens.
        no_limit = shape.n_routed_experts / shape.num_experts_per_tok
        h, captured = self.embedding[tokens.reshape(-1)], []
        for index in range(shape.num_hidden_layers):
            if index in LAYER_IDS:
                captured.append(h.reshape(B, L, -1))
            layer = f"model.layers.{index}"
            x = mx.fast.rms_norm(h, p[f"{layer}.input_layernorm.weight"], shape.rms_norm_eps)
            out, _ = attention(p, f"{layer}.self_attn", x.reshape(B, L, -1), mask, rope, shape)
            h, _ = feed_forward(p, index, h + out.reshape(B * L, -1), shape, no_limit)
        final = mx.fast.rms_norm(h, p["model.norm.weight"], shape.rms_norm_eps)
        return mx.concatenate(captured, axis=-1), final.reshape(B, L, -1)


def make_samples(target: Target, seed: str, count: int, num_rows: int = ROWS) -> list[Sample]:
    """Return `count` dialogues of the training mixture with their states.

    Args:
        target: the model.
        seed: seed of the dialogues.
        count: number of samples.
        num_rows: number of rows that are computed at a time.
    """
    renderer = Renderer(Tokenizer.load(TARGET))
    rows = (renderer.render(dialogue) for dialogue in stream(seed, part=1, max_tokens=MAX_DIALOGUE_TOKENS))
    samples: list[Sample] = []
    while len(samples) < count:
        samples += samples_of(target, pack(rows, num_rows, ROW_LENGTH))
        print(f"\r{len(samples)} of {count} samples", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return samples[:count]


def samples_of(target: Target, bins: list[list[Row]]) -> Iterator[Sample]:
    """Yield the dialogues whose last answer greedy decoding would write."""
    arrays: Parameters = to_arrays(bins, ROW_LENGTH, pad=target.shape.vocab_size - 1).arrays
    captured, final = target.states(arrays["tokens"], arrays["segments"])
    likeliest = np.array(mx.argmax(final @ target.head.T, axis=-1))
    captured_np, final_np = (np.array(x.astype(mx.float16)) for x in (captured, final))
    for index, rows in enumerate(bins):
        start = 0
        for row in rows:
            stop, first = start + len(row.ids), answer_start(row)
            if likeliest[index, start + first - 1 : stop - 1].tolist() == row.ids[first:]:
                yield Sample(row.ids, first, captured_np[index, start:stop], final_np[index, start:stop])
            start = stop


def answer_start(row: Row) -> int:
    """Return the position of the last answer's first token."""
    start = len(row.ids)
    while row.weights[start - 1]:
        start -= 1
    return start


def frequent_tokens(samples: Iterable[Sample], count: int, vocab_size: int) -> np.ndarray:
    """Return the `count` most frequent tokens of the answers, ascending."""
    counts = np.zeros(vocab_size, np.int64)
    for sample in samples:
        np.add.at(counts, sample.ids[sample.answer_start :], 1)
    return np.sort(np.argsort(-counts, kind="stable")[:count])
