"""Train kimi-mini's draft model: `python -m scripts.mini.draft_training SETTINGS`, in a process with a fast BLAS."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.optimizers import AdamW, clip_grad_norm

from scripts.mini.draft_architecture import DRAFT_VOCAB_SIZE
from scripts.mini.draft_batches import batches, to_arrays
from scripts.mini.draft_data import Sample, Target, frequent_tokens, make_samples
from scripts.mini.draft_export import load_draft, quantize_draft, write_draft
from scripts.mini.draft_model import init_draft, loss, tokens_per_step
from scripts.mini.export import folder_bytes
from scripts.mini.model import Parameters

WARM_UP = 0.03  # fraction of the training
GRADIENT_NORM = 1.0
NUM_TEST_SAMPLES = 300
LOG_EVERY = 25


@dataclass
class Settings:
    """Settings of a run.

    Args:
        folder: folder of the exported draft model.
        minutes: training time, not counting the generation of samples.
        num_samples: number of dialogues to train on.
        learning_rate: peak of AdamW's learning rate.
        start: folder of a draft model to continue from; None for fresh parameters.
    """

    folder: str
    minutes: float
    num_samples: int
    learning_rate: float
    start: str | None = None


class DraftTrainer:
    """Trains on kimi-mini's own answers.

    Args:
        settings: settings of the run.
        target: kimi-mini.
        samples: dialogues to train on.
    """

    def __init__(self, settings: Settings, target: Target, samples: list[Sample]):
        self._settings, self._target, self._samples = settings, target, samples
        self.shape = target.shape
        self.drafted = frequent_tokens(samples, DRAFT_VOCAB_SIZE, self.shape.vocab_size)
        self.parameters = init_draft(self.shape, target.head[mx.array(self.drafted)], seed=1)
        if settings.start is not None:
            self._start_from(Path(settings.start))
        self.num_steps = self.num_tokens = 0

    def _start_from(self, folder: Path) -> None:
        """Take the parameters of another draft model, which may draft other tokens."""
        parameters, drafted = load_draft(folder)
        head, rows = np.array(self.parameters["lm_head.weight"]), np.array(parameters["lm_head.weight"])
        _, own, others = np.intersect1d(self.drafted, drafted, return_indices=True)
        head[own] = rows[others]
        self.parameters = {**parameters, "lm_head.weight": mx.array(head)}

    def run(self) -> None:
        """Train until the time is up."""
        function = mx.value_and_grad(lambda p, batch: loss(p, batch, self.shape))
        optimizer = AdamW(self._settings.learning_rate, betas=[0.9, 0.95], weight_decay=0.01)
        started, seed = time.monotonic(), 0
        while True:
            seed += 1
            for rows in batches(self._samples, seed):
                fraction = (time.monotonic() - started) / (60 * self._settings.minutes)
                if fraction >= 1:
                    return
                optimizer.learning_rate = self._settings.learning_rate * min(fraction / WARM_UP, 1 - fraction, 1) + 1e-6
                (value, shares), gradients = function(self.parameters, self.arrays(rows))
                gradients, _ = clip_grad_norm(gradients, GRADIENT_NORM)
                self.parameters = optimizer.apply_gradients(gradients, self.parameters)
                mx.eval(self.parameters, optimizer.state, value, shares)
                self.num_steps += 1
                self.num_tokens += sum(len(sample.ids) for row in rows for sample in row)
                if self.num_steps % LOG_EVERY == 0:
                    text = (
                        f"step {self.num_steps}  loss {value.item():.3f}  {tokens_per_step(shares):.2f} tokens per step"
                    )
                    print(f"{text}  {100 * fraction:.0f} %", file=sys.stderr, flush=True)

    def arrays(self, rows: list[list[Sample]]) -> Parameters:
        """Return the batch of some rows."""
        return to_arrays(rows, self._target.embedding, self._target.head, self.drafted)

    def test(self, samples: list[Sample]) -> list[float]:
        """Return, for each depth, the share of drafts that are right up to it, on other samples."""
        shares = [
            np.array(loss(self.parameters, self.arrays(rows), self.shape)[1]) for rows in batches(samples, seed=0)
        ]
        return np.mean(shares, axis=0).tolist()

    def export(self) -> int:
        """Write the draft model as it ships; return its bytes on disk."""
        progress = {"step": self.num_steps, "tokens": self.num_tokens}
        folder = Path(self._settings.folder)
        write_draft(folder, quantize_draft(self.parameters), self.drafted, self.shape, progress)
        return folder_bytes(folder)


def main(settings: Settings) -> None:
    """Make samples, train, test and export."""
    target = Target()
    trainer = DraftTrainer(settings, target, make_samples(target, "draft", settings.num_samples))
    trainer.run()
    shares = trainer.test(make_samples(target, "draft test", NUM_TEST_SAMPLES))
    print("right up to depth: " + ", ".join(f"{share:.3f}" for share in shares))
    print(f"{tokens_per_step(shares):.2f} tokens per step with {len(shares)} draft tokens, on new prompts")
    print(f"{trainer.num_steps} steps, {trainer.num_tokens:,} tokens; wrote {trainer.export() / 1e6:.2f} MB")


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    main(Settings(**json.loads(sys.argv[1])))
