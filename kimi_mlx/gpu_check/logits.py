"""Logits of kimi-mini and of a random model at K2's widths, against the CPU in float32."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from kimi_mlx.gpu_check.context import Context, row_errors
from kimi_mlx.gpu_check.random_model import RandomWeights, model_config, random_tokens
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.store.locate import ensure_downloaded
from kimi_mlx.weights.assemble import load_model

LIMITS = {mx.float32: 2e-3, mx.bfloat16: 0.15}
"""Largest median, over the positions, of the relative error of the logits."""

ANY_POSITION_LIMITS = {mx.float32: 2e-3, mx.bfloat16: 0.9}
"""Largest relative error of any position. Where rounding to bfloat16 makes the router choose another expert, it is
large."""

CONTINUATION = (9, 1)
"""Numbers of tokens of the steps after the last prompt, which use its cache."""


def check(context: Context) -> None:
    """Compare the logits of all positions of each prompt, then of steps that continue the longest one."""
    folder = ensure_downloaded("kimi-mini", 1, "hybrid", None)
    config = load_config(folder)
    _compare_models(context, "kimi-mini", lambda dtype: load_model(folder, config, dtype))
    _compare_models(context, "K2-shaped", RandomWeights(model_config(context.sizes)).model)


def _compare_models(context: Context, name: str, model_of: Callable[[mx.Dtype], Model]) -> None:
    reference = model_of(mx.float32)
    context.progress(f"{name} on the CPU")
    expected = _logits(context, reference)
    for dtype in context.dtypes:
        context.progress(f"{name} in {_short(dtype)}")
        model = model_of(dtype)
        with context.on_device():
            logits = _logits(context, model)
        for label, got in logits.items():
            errors = row_errors(got, expected[label])
            context.report(f"{name} {_short(dtype)} {label}", float(np.median(errors)), LIMITS[dtype])
            context.report(f"{name} {_short(dtype)} {label}, any", float(errors.max()), ANY_POSITION_LIMITS[dtype])


def _logits(context: Context, model: Model) -> dict[str, mx.array]:
    """Return logits by label of the step."""
    logits: dict[str, mx.array] = {}
    prompts = context.sizes.prompts
    tokens = random_tokens(max(prompts) + sum(CONTINUATION), model.config.vocab_size)
    cache = model.make_cache()
    for length in prompts:
        cache = model.make_cache()
        logits[f"{length}"] = model(tokens[:, :length], cache)
        mx.eval(logits[f"{length}"])
    start = prompts[-1]
    for length in CONTINUATION:
        label = f"{start}+{length}"
        logits[label] = model(tokens[:, start : start + length], cache)
        mx.eval(logits[label])
        start += length
    return logits


def _short(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
