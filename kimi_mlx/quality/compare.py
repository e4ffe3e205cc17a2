"""Compare the next-token distributions of two models on the same tokens.

Letters: P positions that have a next token, in all windows together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.quality.layerwise import LayerwiseModel, Windows

LOGITS_VALUES = 1 << 25
"""Maximum number of logits of one model that are computed at a time: 134 MB in float32."""


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison of model B with model A.

    Args:
        positions: number of positions.
        kl_mean: mean of KL(A || B) over the positions, in nats.
        kl_p90: 90th percentile.
        kl_max: maximum.
        top1_agreement: share of the positions at which both models give the same token the highest probability.
        perplexity_a: perplexity of A: exp of the mean negative log-probability of the next token of the text.
        perplexity_b: perplexity of B.
    """

    positions: int
    kl_mean: float
    kl_p90: float
    kl_max: float
    top1_agreement: float
    perplexity_a: float
    perplexity_b: float


def compare(a: LayerwiseModel, b: LayerwiseModel, windows: Windows, progress: Callable[[int, int], None]) -> Comparison:
    """Run both models over the windows, one after the other, and compare them.

    Args:
        a: reference model.
        b: other model, with the same vocabulary.
        windows: token ids.
        progress: callback with the layers of both that are done, and their total.

    Raises:
        WeightsError: a model gives values that are not finite.
    """
    layers = a.config.num_hidden_layers
    total = layers + b.config.num_hidden_layers
    states_a = a.hidden(windows, lambda done, _: progress(done, total))
    states_b = b.hidden(windows, lambda done, _: progress(layers + done, total))
    return compare_states(a, b, windows, states_a, states_b)


def compare_states(
    a: LayerwiseModel, b: LayerwiseModel, windows: Windows, states_a: list[mx.array], states_b: list[mx.array]
) -> Comparison:
    """Compare two models by their hidden states after the last layer, as LayerwiseModel.hidden returns them.

    Raises:
        WeightsError: a model gives values that are not finite.
    """
    head_a, head_b = a.head(), b.head()
    rows = max(1, LOGITS_VALUES // a.config.vocab_size)
    kl: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    agreements: list[np.ndarray] = []
    for number, window in enumerate(windows):
        following = mx.array(list(window[1:]))
        for start in range(0, len(window) - 1, rows):
            part = slice(start, min(start + rows, len(window) - 1))
            log_a = head_a.log_probabilities(states_a[number][0, part])
            log_b = head_b.log_probabilities(states_b[number][0, part])
            divergence = (mx.exp(log_a) * (log_a - log_b)).sum(axis=-1)
            ids = following[part][:, None]
            loss = [-mx.take_along_axis(log, ids, axis=-1)[:, 0] for log in (log_a, log_b)]
            kl.append(np.array(divergence))
            losses.append(np.array(mx.stack(loss)))
            agreements.append(np.array(log_a.argmax(axis=-1) == log_b.argmax(axis=-1)))
    return _summarize(a, b, np.concatenate(kl), np.concatenate(losses, axis=1), np.concatenate(agreements))


def _summarize(
    a: LayerwiseModel, b: LayerwiseModel, kl: np.ndarray, losses: np.ndarray, agreements: np.ndarray
) -> Comparison:
    """Return the summary of values of all positions: kl (P), losses (2, P), agreements (P)."""
    for model, loss in ((a, losses[0]), (b, losses[1])):
        if not np.isfinite(loss).all():
            raise WeightsError(
                f"`{model.folder}` gives values that are not finite at {np.count_nonzero(~np.isfinite(loss))} of "
                f"{len(loss)} positions",
                hint="its weights are damaged, or the compute type is too small: try `--dtype float32`",
            )
    kl = np.maximum(kl.astype(np.float64), 0)  # rounding may give a tiny negative value
    perplexity_a, perplexity_b = (math.exp(loss.mean(dtype=np.float64)) for loss in losses)
    return Comparison(
        len(kl),
        float(kl.mean()),
        float(np.quantile(kl, 0.9)),
        float(kl.max()),
        float(agreements.mean()),
        perplexity_a,
        perplexity_b,
    )
