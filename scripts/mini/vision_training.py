"""Training of kimi-mini-vl: first the tower alone with probes, then tower and text model together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from scripts.mini.batches import Batch
from scripts.mini.model import Parameters, loss
from scripts.mini.quantize import dequantize, fake_quantize
from scripts.mini.tower import features, init_tower, is_tower, probe_loss
from scripts.mini.training import WARM_UP_STEPS, Trainer
from scripts.mini.vision_batches import make_dialogue_batch, make_picture_batch

TOGETHER_FROM = 0.24  # fraction of the training at which the text model joins
QUANTIZED_FROM = 0.7
DECAY_FROM = 0.5
TOGETHER_RATE = 0.6  # learning rate from then on, as a share of the peak
PROBE_WEIGHT = 0.3  # of the probes' loss, beside that of the dialogues

TEXT_MODEL = Path(__file__).resolve().parents[2] / "kimi_mlx" / "models" / "kimi-mini"


def text_parameters(folder: Path = TEXT_MODEL) -> Parameters:
    """Return kimi-mini's shipped parameters, dequantized."""
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    return dequantize(tensors)


class VisionTrainer(Trainer):
    """One rank of kimi-mini-vl's training."""

    def initial_parameters(self) -> Parameters:
        """Return kimi-mini's text model and a fresh tower."""
        return text_parameters() | init_tower(seed=1)

    def part_at(self, fraction: float) -> int:
        """Return 0 while the tower is trained alone, then 1."""
        return int(fraction >= TOGETHER_FROM)

    def is_quantized(self, fraction: float) -> bool:
        """Return whether the text model's weights are rounded."""
        return fraction >= QUANTIZED_FROM

    def learning_rate(self, fraction: float) -> float:
        """Return the learning rate: it warms up twice, and falls linearly in the last part."""
        step, peak = self.progress.step, self.settings.learning_rate
        if self.part_at(fraction) == 0:
            return peak * min(1.0, (step + 1) / WARM_UP_STEPS)
        warm_up = min(1.0, 0.1 + (fraction - TOGETHER_FROM) / 0.03)
        decay = min(1.0, (1.0 - fraction) / (1.0 - DECAY_FROM))
        return peak * TOGETHER_RATE * warm_up * max(decay, 0.01)

    def gradients(self, fraction: float) -> tuple[Batch, tuple[mx.array, mx.array, mx.array], Parameters]:
        """Return the batch of the current step; its loss, largest logits and loads; the gradients."""
        seed, step, rank = self.settings.seed, self.progress.step, self.group.rank()
        if self.part_at(fraction) == 0:
            batch, grid = make_picture_batch(seed, step, rank)
            tower = {name: value for name, value in self.parameters.items() if is_tower(name)}
            return batch, *mx.value_and_grad(lambda p: self._probe_loss(p, batch.arrays, grid))(tower)
        batch, grid = make_dialogue_batch(self.renderer, self.shape.vocab_size - 1, seed, step, rank)
        rounded = _round_text if self.is_quantized(fraction) else dict
        return batch, *mx.value_and_grad(lambda p: self._loss(rounded(p), batch.arrays, grid))(self.parameters)

    def _probe_loss(self, p: Parameters, arrays: Parameters, grid: tuple[int, int]):
        value = probe_loss(p, features(p, arrays["patches"], grid), arrays["labels"])
        layers, experts = self.shape.num_hidden_layers, self.shape.n_routed_experts
        moe_layers = layers - self.shape.first_k_dense_replace
        return value, mx.zeros((layers, self.shape.num_attention_heads)), mx.zeros((moe_layers, experts))

    def _loss(self, p: Parameters, arrays: Parameters, grid: tuple[int, int]):
        tokens = features(p, arrays["patches"], grid)
        value, logits, loads = loss(p, arrays, self.shape, (tokens, arrays["places"]))
        return value + PROBE_WEIGHT * probe_loss(p, tokens, arrays["labels"]), logits, loads


def _round_text(parameters: Parameters) -> Parameters:
    text = {name: value for name, value in parameters.items() if not is_tower(name)}
    return parameters | fake_quantize(text)
