"""One rank of the training: batches, gradients summed over the ring, MuonClip, checkpoints."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from kimi_mlx.text.tokenizer import Tokenizer
from scripts.mini import checkpoint
from scripts.mini.architecture import Shape
from scripts.mini.averaging import StepMetrics, average, clip_by_norm
from scripts.mini.batches import Batch, make_batch
from scripts.mini.model import Parameters, init_parameters, loss
from scripts.mini.optimizer import MuonClip, balance_experts, is_trained, qk_clip
from scripts.mini.quantize import fake_quantize
from scripts.mini.render import Renderer

WARM_UP_STEPS = 60
DECAY_FROM = 0.72  # fraction of the training from which the learning rate decays
QUANTIZED_FROM = 0.82
PARTS_FROM = (0.0, 0.42, 0.66)  # fractions of the training at which the parts of the mixture begin
LONGEST_STEP_S = 12.0  # a longer one was a pause and does not count as training time
GRADIENT_NORM = 1.0


@dataclass
class Settings:
    """Settings of a run."""

    folder: str
    vocabulary: str
    minutes: float
    learning_rate: float = 3e-3
    use_muon: bool = True
    seed: str = "kimi-mini"
    vision: bool = False  # trains kimi-mini-vl
    checkpoint_every_s: float = 150.0
    stop_after_s: float = 0.0  # ends the run early, for trials


@dataclass
class Progress:
    """Progress of the training; saved with each checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


def learning_rate_at(fraction: float, step: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up, constant, linear decay."""
    decay = min(1.0, max(0.0, (1.0 - fraction) / (1.0 - DECAY_FROM)))
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * max(decay, 0.01)


def part_at(fraction: float) -> int:
    """Return the number of the mixture's current part."""
    return max(part for part, start in enumerate(PARTS_FROM) if fraction >= start)


class Trainer:
    """The state of one rank; all ranks hold equal parameters."""

    def __init__(self, settings: Settings, group: mx.distributed.Group):
        self.settings, self.group = settings, group
        self.tokenizer = Tokenizer.load(Path(settings.vocabulary))
        self.renderer = Renderer(self.tokenizer)
        self.shape = Shape(self.tokenizer.vocab_size)
        self.parameters = self.initial_parameters()
        self.optimizer = MuonClip(self.parameters, settings.use_muon, group)
        self.progress = Progress()
        self._clock = time.monotonic()
        saved = checkpoint.load(Path(settings.folder))
        if saved is not None:
            self.parameters, self.optimizer.state, progress = saved
            self.progress = Progress(**progress)

    def initial_parameters(self) -> Parameters:
        """Return the parameters of step 0."""
        return init_parameters(self.shape, seed=1)

    def part_at(self, fraction: float) -> int:
        """Return the number of the training's current part."""
        return part_at(fraction)

    def is_quantized(self, fraction: float) -> bool:
        """Return whether the forward pass uses rounded weights."""
        return fraction >= QUANTIZED_FROM

    def learning_rate(self, fraction: float) -> float:
        """Return the learning rate of the current step."""
        return learning_rate_at(fraction, self.progress.step, self.settings.learning_rate)

    def gradients(self, fraction: float) -> tuple[Batch, tuple[mx.array, mx.array, mx.array], Parameters]:
        """Return the batch of the current step; its loss, largest logits and loads; the gradients."""
        batch = make_batch(
            self.renderer,
            pad=self.shape.vocab_size - 1,
            seed=self.settings.seed,
            step=self.progress.step,
            rank=self.group.rank(),
            part=part_at(fraction),
        )
        rounded = fake_quantize if self.is_quantized(fraction) else dict
        function = mx.value_and_grad(lambda p: loss(rounded(p), batch.arrays, self.shape))
        return batch, *function(self.parameters)

    @property
    def fraction(self) -> float:
        """Fraction of the training time that is over."""
        return self.progress.seconds / (60 * self.settings.minutes)

    def run(self) -> None:
        """Train until the time is up."""
        limit = self.settings.stop_after_s or 60 * self.settings.minutes
        self._clock = saved_at = time.monotonic()
        while self.progress.seconds < limit:
            record = self._step()
            if self.group.rank() == 0:
                self._log(record)
                if time.monotonic() - saved_at > self.settings.checkpoint_every_s:
                    self._save()
                    saved_at = time.monotonic()
        if self.group.rank() == 0:
            self._save()

    def _step(self) -> dict[str, Any]:
        progress, fraction = self.progress, self.fraction
        batch, (value, logits, loads), gradients = self.gradients(fraction)
        trained = {name: gradient for name, gradient in gradients.items() if is_trained(name)}
        mx.eval(trained, value, logits, loads)
        own = StepMetrics(float(value), batch.tokens, self._lap(), loads, logits)
        trained, common = average(trained, own, self.group)
        trained, norm = clip_by_norm(trained, GRADIENT_NORM)
        rate = self.learning_rate(fraction)
        self.parameters = self.optimizer.step(self.parameters, trained, rate, progress.step + 1)
        clipped = qk_clip(self.parameters, common.logits, self.shape)
        balance_experts(self.parameters, common.loads, self.shape)
        mx.eval(self.parameters, self.optimizer.state)
        progress.step += 1
        progress.tokens += common.tokens
        progress.seconds += common.seconds
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "minutes": round(progress.seconds / 60, 2),
            "loss": round(common.loss, 4),
            "row": batch.row_length,
            "part": self.part_at(fraction),
            "quantized": self.is_quantized(fraction),
            "rate": rate,
            "norm": round(norm, 3),
            "logit": round(float(common.logits.max()), 1),
            "clipped": len(clipped),
            "load": round(float(common.loads.max() / mx.maximum(common.loads.mean(), 1)), 2),
        }

    def _lap(self) -> float:
        """Return the seconds since the last lap; a pause of the process counts as one long step."""
        now = time.monotonic()
        lap, self._clock = now - self._clock, now
        return min(lap, LONGEST_STEP_S)

    def _log(self, record: dict[str, Any]) -> None:
        if record["step"] % 10 == 0:
            with (Path(self.settings.folder) / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
        if record["step"] % 50 == 0:
            self.progress.curve.append(record)

    def _save(self) -> None:
        checkpoint.save(Path(self.settings.folder), self.parameters, self.optimizer.state, asdict(self.progress))
