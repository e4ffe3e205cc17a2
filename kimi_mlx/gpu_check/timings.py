"""Times and peak memory of a decode step, of a fence, and of the neighbours of each constant in device_traits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from kimi_mlx.gpu_check.context import Context
from kimi_mlx.gpu_check.random_model import RandomWeights, filled_cache, model_config, random_tokens
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.decoder import Model, SequenceSlice
from kimi_mlx.model.device_traits import Tuning
from kimi_mlx.model.moe import MoE

NUM_FENCES = 20
NUM_SEQUENCES = 8
NO_LIMIT = 10**9
"""Value of a constant above all sizes that occur."""

ALWAYS, NEVER = 1e30, 1.0
"""Speeds of latent attention with which it is always chosen, or for single tokens only."""

MAX_FEW_QUERIES = 256
"""Largest number of new tokens to start from; on a CPU latent attention has no break-even."""


def check(context: Context) -> None:
    """Measure the random model in bfloat16, or in float32 on a CPU."""
    dtype = mx.float32 if context.device == "cpu" else mx.bfloat16
    weights = RandomWeights(model_config(context.sizes))
    with context.on_device():
        model = weights.model(dtype)
        for run in (_fence, _decode, _few_queries, _stacked_sequences, _sorted_experts, _chunks):
            context.progress((run.__doc__ or "").partition(".")[0])
            run(context, model)


def _fence(context: Context, model: Model) -> None:
    """Round trip of a fence: the device waits for the CPU, and the CPU for the device, as in each collective."""
    cpu, device = mx.new_stream(mx.cpu), mx.default_stream(mx.default_device())  # pyright: ignore[reportArgumentType]

    def chain(first: mx.Stream) -> mx.array:
        x = mx.zeros((model.config.hidden_size,))
        for _ in range(NUM_FENCES):
            x = mx.add(mx.add(x, 1, stream=first), 1, stream=device)
        return x

    seconds = context.median_s(lambda: chain(cpu)) - context.median_s(lambda: chain(device))
    context.measure("fence", "round trip", max(seconds, 0.0) / NUM_FENCES * 1e6, "us")


def _decode(context: Context, model: Model) -> None:
    """Decode steps, each launched on the unread token of the one before."""
    for cached in context.sizes.contexts:
        cache = filled_cache(model, cached)
        token = random_tokens(1, model.config.vocab_size)
        mx.eval(_next_token(model, token, cache))
        mx.synchronize()
        mx.clear_cache()
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        started = time.perf_counter()
        for _ in range(context.sizes.repeats):
            next_token = _next_token(model, token, cache)
            mx.async_eval(next_token)
            token.tolist()
            token = next_token
        mx.eval(token)
        seconds = (time.perf_counter() - started) / context.sizes.repeats
        context.measure("decode step, 2 layers", f"{cached} cached", seconds * 1e3, "ms")
        cache_bytes = sum(array.nbytes for layer in cache for array in layer.state)
        context.measure("memory of decode", f"cache of {cached}", cache_bytes / 1e6, "MB")
        context.measure("memory of decode", "peak", (mx.get_peak_memory() - active) / 1e6, "MB")


def _few_queries(context: Context, model: Model) -> None:
    """Few new tokens on a long context, attending in the latent space and by heads."""
    cached = context.sizes.contexts[-1] // 4
    limit = model.attention_cost.max_latent_queries(MAX_FEW_QUERIES)
    cache = filled_cache(model, cached)
    for length in (limit // 4, limit // 2, limit, 2 * limit):
        tokens = random_tokens(length, model.config.vocab_size)
        run = _repeatable_step(model, tokens, [(cache, length)])
        for label, latent_flops in (("latent", ALWAYS), ("heads", NEVER)):
            seconds = _seconds_with(context, model, run, latent_flops=latent_flops)
            context.measure(f"new tokens on {cached}", f"{length} {label}", seconds * 1e3, "ms")


def _stacked_sequences(context: Context, model: Model) -> None:
    """One token of several sequences, with stacked and with separate caches."""
    tokens = random_tokens(NUM_SEQUENCES, model.config.vocab_size)
    for cached in (context.sizes.contexts[-1] // share for share in (128, 32, 8)):
        caches = [filled_cache(model, cached, seed) for seed in range(NUM_SEQUENCES)]
        run = _repeatable_step(model, tokens, [(cache, 1) for cache in caches])
        for label, value in (("stacked", NO_LIMIT), ("separate", 0)):
            seconds = _seconds_with(context, model, run, stack_max_keys=value)
            context.measure(f"{NUM_SEQUENCES} sequences", f"{cached} {label}", seconds * 1e3, "ms")


def _sorted_experts(context: Context, model: Model) -> None:
    """Experts of a few tokens, with sorted and with unsorted choices."""
    mlp = model.layers[-1].mlp
    assert isinstance(mlp, MoE)
    limit = mlp.sort_min_choices
    for choices in (limit // 2, limit, 2 * limit, 8 * limit):
        length = -(-choices // mlp.gate.num_chosen)
        x = mx.random.normal((1, length, model.config.hidden_size), key=mx.random.key(length))
        x = x.astype(model.layers[0]["input_layernorm"].dtype)
        for label, value in (("sorted", 0), ("unsorted", NO_LIMIT)):
            constants = {"sort_min_choices": value, "sort_min_per_expert": 0}
            seconds = _seconds_with(context, model, lambda x=x: [mlp(x, None, *mlp.gate(x))], **constants)
            context.measure("experts, choices", f"{length * mlp.gate.num_chosen} {label}", seconds * 1e3, "ms")


def _chunks(context: Context, model: Model) -> None:
    """Prefill in chunks of several sizes."""
    total, chunk = context.sizes.prefill, model.tuning.prefill_chunk
    tokens = random_tokens(total, model.config.vocab_size)
    for size in (chunk // 2, chunk, 2 * chunk, 4 * chunk):
        if size > total:
            break
        started = time.perf_counter()
        cache = model.make_cache()
        for start in range(0, total, size):
            part = tokens[:, start : start + size]
            mx.eval(model.hidden(part, [SequenceSlice(cache, part.shape[1])]))
        seconds = time.perf_counter() - started
        context.measure("prefill, chunk of", f"{size}", total / seconds, "tok/s")


def _next_token(model: Model, token: mx.array, cache: list[LatentCache]) -> mx.array:
    logits = model.logits(model.hidden(token, [SequenceSlice(cache, 1)]))
    return mx.argmax(logits, axis=-1)


def _repeatable_step(
    model: Model, tokens: mx.array, sequences: Sequence[tuple[list[LatentCache], int]]
) -> Callable[[], Sequence[mx.array]]:
    """Return a function that runs a step and removes its tokens from the caches, so that it can run again."""

    def run() -> Sequence[mx.array]:
        hidden = model.hidden(tokens, [SequenceSlice(cache, length, length) for cache, length in sequences])
        mx.eval(hidden)
        for cache, length in sequences:
            for layer in cache:
                layer.trim(length)
        return [hidden]

    return run


def _seconds_with(context: Context, model: Model, run: Callable[[], Sequence[mx.array]], **constant: float) -> float:
    """Return the time of `run` with another value of a constant."""
    tuning: Tuning = model.tuning
    model.tune(replace(tuning, **constant))
    try:
        return context.median_s(run, max(context.sizes.repeats // 4, 2))
    finally:
        model.tune(tuning)
