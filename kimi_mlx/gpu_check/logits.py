"""Logits of kimi-mini and of a random model at K2's widths, against the CPU in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from kimi_mlx.gpu_check.context import Context, row_errors
from kimi_mlx.gpu_check.random_model import RandomWeights, model_config, random_tokens
from kimi_mlx.gpu_check.reference import plain_products
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
    length = context.sizes.prompts[-1] + sum(CONTINUATION)
    tokens = random_tokens(length, reference.config.vocab_size)
    context.progress(f"{name} on the CPU, {length} tokens")
    with plain_products():
        expected = reference(tokens)
        mx.eval(expected)
    for dtype in context.dtypes:
        short = str(dtype).removeprefix("mlx.core.")
        with context.on_device():
            model = model_of(dtype)
        for label, start, logits in _steps(context, model, tokens):
            context.progress(f"{name} in {short}, {label} tokens")
            errors = row_errors(logits, expected[:, start : start + logits.shape[1]])
            context.report(f"{name} {short} {label}", float(np.median(errors)), LIMITS[dtype])
            context.report(f"{name} {short} {label}, any", float(errors.max()), ANY_POSITION_LIMITS[dtype])


def _steps(context: Context, model: Model, tokens: mx.array) -> Iterator[tuple[str, int, mx.array]]:
    """Yield a label, the first position, and the logits of each prompt and of each step after the last one.

    All are parts of the same tokens, so that one pass of the reference has the logits of all.
    """
    prompts = context.sizes.prompts
    start, cache = 0, model.make_cache()
    for index, length in enumerate((*prompts, *CONTINUATION)):
        if index < len(prompts):
            start, cache = 0, model.make_cache()
        with context.on_device():
            logits = model(tokens[:, start : start + length], cache)
            mx.eval(logits)
        yield f"{start}+{length}" if start else f"{length}", start, logits
        start += length
