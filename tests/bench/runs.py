"""Benchmark runs with given rates, for tests."""

from __future__ import annotations

from kimi_mlx.bench.measure import Case, Run
from kimi_mlx.bench.sides import BatchResult, TimedAnswer
from kimi_mlx.engine.events import Statistics

SINGLE = Case(0, 100, 1)


def make_run(
    side: str,
    repetition: int,
    prefill: float,
    decode: float,
    ids: tuple[int, ...] = tuple(range(11)),
    case: Case = SINGLE,
    cached: int | None = None,
    energy_j: float | None = None,
) -> Run:
    """Return a run of one case at these rates, in which the requests of a batch run one after another."""
    ttft, step = case.prompt_tokens / prefill, 1 / decode
    cached = case.depth if cached is None else cached
    prompt = case.depth + case.prompt_tokens
    decode_s = step * (len(ids) - 1)
    answers = [
        TimedAnswer(
            ids,
            Statistics(prompt, cached, len(ids), ttft, decode_s, 10**9),
            tuple(number * (ttft + decode_s) + ttft + step * index for index in range(len(ids))),
        )
        for number in range(case.concurrency)
    ]
    return Run(side, case, repetition, BatchResult(tuple(answers), 0.0, (10**9, 2 * 10**9)), energy_j)
