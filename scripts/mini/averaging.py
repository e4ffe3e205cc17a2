"""Average gradients and metrics over the ranks after a step, with one `all_sum`."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from scripts.mini.model import Parameters


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of a step: of one rank, or combined over all ranks.

    Attributes:
        loss: loss of the rank's batch; combined: mean.
        tokens: number of tokens without padding; combined: sum.
        seconds: training time of the step; combined: rank 0's.
        loads: number of tokens per expert (MoE layers, E); combined: sum.
        logits: largest attention logit (layers, H); combined: maximum.
    """

    loss: float
    tokens: int
    seconds: float
    loads: mx.array
    logits: mx.array


def average(gradients: Parameters, own: StepMetrics, group: mx.distributed.Group) -> tuple[Parameters, StepMetrics]:
    """Return mean gradients and combined metrics, bit-identical on all ranks."""
    size, rank = group.size(), group.rank()
    names = sorted(gradients)
    logits = mx.zeros((size, *own.logits.shape))
    logits[rank] = own.logits  # one row per rank, so that the maximum can be taken after the sum
    numbers = mx.array([own.loss, float(own.tokens), own.seconds if rank == 0 else 0.0])
    parts = [*(gradients[name] for name in names), numbers, own.loads.astype(mx.float32), logits]
    flat = mx.concatenate([part.reshape(-1) for part in parts])
    flat = mx.distributed.all_sum(flat, group=group)
    mx.eval(flat)
    summed: list[mx.array] = []
    start = 0
    for part in parts:
        summed.append(flat[start : start + part.size].reshape(part.shape))
        start += part.size
    loss, tokens, seconds = (float(number) for number in summed[-3])
    common = StepMetrics(loss / size, round(tokens), seconds, summed[-2], summed[-1].max(axis=0))
    return {name: total / size for name, total in zip(names, summed, strict=False)}, common


def clip_by_norm(gradients: Parameters, limit: float) -> tuple[Parameters, float]:
    """Scale gradients to a common norm of at most `limit`; return them and their original norm."""
    norm = float(mx.sqrt(mx.stack([gradient.square().sum() for gradient in gradients.values()]).sum()))
    scale = min(1.0, limit / (norm + 1e-6))
    return {name: gradient * scale for name, gradient in gradients.items()}, norm
