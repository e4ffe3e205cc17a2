"""Measure the time of steps of a few tokens, with all ranks."""

from __future__ import annotations

import statistics
import time

import mlx.core as mx
import numpy as np

from kimi_mlx.engine.batch_entry import BatchEntry
from kimi_mlx.engine.drafts.step_times import MEASURED_TOKENS
from kimi_mlx.engine.kv_cache_pool import SequenceCache
from kimi_mlx.engine.request import Request
from kimi_mlx.engine.sequence import Sequence
from kimi_mlx.engine.step_runner import StepRunner
from kimi_mlx.engine.token_sampler import TokenSampler
from kimi_mlx.model.decoder import Model

PROMPT_TOKENS = 16
"""Number of tokens in the cache."""

NUM_STEPS = 4
"""Number of steps of each size. The first one is discarded, because it may compile kernels."""


def measure_steps(model: Model, runner: StepRunner) -> dict[int, float]:
    """Measure steps; return seconds by number of tokens. Collective: all ranks run the same steps.

    The tokens are random, so that they choose different experts.
    """
    longest = MEASURED_TOKENS[-1]
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPT_TOKENS + longest).tolist()
    request = Request(tuple(ids[:PROMPT_TOKENS]), longest)
    sequence = Sequence(0, request, longest, TokenSampler(request, 0, None))
    cache = SequenceCache(model)
    sequence.begin(cache, 0)

    def run(tokens: list[int]) -> float:
        began = time.perf_counter()
        count = len(tokens)
        step = runner.start([BatchEntry(sequence, sequence.epoch, count, count, 1, 0, tuple(tokens))], None)
        runner.sample(step)
        runner.read(step)
        if step.captured is not None:
            step.captured.receive()
        return time.perf_counter() - began

    run(ids[:PROMPT_TOKENS])
    seconds: dict[int, float] = {}
    for count in MEASURED_TOKENS:
        times: list[float] = []
        for _ in range(NUM_STEPS):
            times.append(run(ids[PROMPT_TOKENS : PROMPT_TOKENS + count]))
            for layer in cache.layers:
                layer.trim(count)
        seconds[count] = statistics.median(times[1:])
    mx.clear_cache()
    return seconds
