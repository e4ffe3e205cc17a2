"""Statistics of a benchmark's runs."""

from __future__ import annotations

import pytest

from kimi_mlx.bench.measure import Case
from kimi_mlx.bench.results import Percentiles, agreements, notes, ratios, rows
from tests.bench.runs import make_run

RUNS = [
    make_run("kimi-mlx", -1, 1, 1),
    make_run("mlx-lm tensor", -1, 1, 1),
    make_run("mlx-lm pipeline", -1, 1, 1, ids=(0, 1, 4)),
    *(make_run("kimi-mlx", i, 400 + i, 60 + i) for i in range(3)),
    *(make_run("mlx-lm tensor", i, 200, 20) for i in range(3)),
    *(make_run("mlx-lm pipeline", i, 100, 30, ids=(0, 1)) for i in range(3)),
]


class NamedSide:
    def __init__(self, name: str, not_batched_because: str | None):
        self.name, self.not_batched_because = name, not_batched_because

    def run(self, batch: object) -> object:
        raise NotImplementedError


def test_medians_and_spread_exclude_the_warm_up() -> None:
    ours = rows(RUNS)[0]
    assert (ours.side, ours.case.prompt_tokens, ours.generation_tokens) == ("kimi-mlx", 100, 11)
    spread = ours.rates["decode_tok_per_s"]
    assert (spread.median, spread.min, spread.max) == pytest.approx((61, 60, 62))
    assert ours.peak_memory_bytes == (10**9, 2 * 10**9)
    assert ours.joules_per_token is None


def test_percentiles_are_of_all_requests_and_all_gaps() -> None:
    assert Percentiles.of([1, 2, 3, 4, 5]) == Percentiles(3, 4.6, 4.96)
    row = rows([make_run("kimi-mlx", 0, 100, 10, case=Case(0, 100, 2))])[0]
    assert row.ttft_s.p50 == pytest.approx(2.0)  # 1 s, and 3 s after the first
    assert row.between_tokens_s.p99 == pytest.approx(0.1)


def test_the_aggregate_is_all_tokens_over_the_wall_time() -> None:
    row = rows([make_run("kimi-mlx", 0, 100, 10, case=Case(0, 100, 2))])[0]
    assert row.rates["aggregate_tok_per_s"].median == pytest.approx(22 / 4)
    assert row.rates["decode_tok_per_s"].median == pytest.approx(10)


def test_the_depth_is_not_counted_as_prefill() -> None:
    row = rows([make_run("kimi-mlx", 0, 50, 10, case=Case(4000, 100, 1))])[0]
    assert row.rates["prefill_tok_per_s"].median == pytest.approx(50)


def test_joules_are_per_new_token() -> None:
    runs = [make_run("kimi-mlx", i, 100, 10, energy_j=energy) for i, energy in enumerate([11.0, 33.0, None])]
    assert rows(runs)[0].joules_per_token == pytest.approx(2)


def test_ratios_are_to_the_best_other_side_in_each_rate() -> None:
    prefill, decode = ratios(RUNS)
    assert (round(prefill.ratio, 3), prefill.against) == (2.005, "mlx-lm tensor")
    assert (round(decode.ratio, 3), decode.against) == (2.033, "mlx-lm pipeline")


def test_each_case_has_its_ratios_and_concurrent_requests_an_aggregate() -> None:
    single, concurrent = Case(0, 100, 1), Case(0, 100, 4)
    runs = [
        make_run("kimi-mlx", 0, 100, 10, case=single),
        make_run("kimi-mlx", 0, 100, 10, case=concurrent),
        make_run("mlx-lm", 0, 50, 10, case=single),
        make_run("mlx-lm", 0, 100, 5, case=concurrent),
    ]
    results = ratios(runs)
    assert [(ratio.case, ratio.figure) for ratio in results] == [
        (single, "prefill_tok_per_s"),
        (single, "decode_tok_per_s"),
        (concurrent, "aggregate_tok_per_s"),
    ]
    assert results[0].ratio == pytest.approx(2)
    assert results[2].ratio == pytest.approx(1.5)


def test_tokens_are_compared_answer_by_answer() -> None:
    tensor, pipeline = agreements(RUNS)
    assert (tensor.side, tensor.answers, tensor.equal, tensor.first_difference) == ("mlx-lm tensor", 4, 4, None)
    assert (pipeline.answers, pipeline.equal, pipeline.first_difference) == (4, 0, 2)


def test_a_shorter_answer_differs_at_its_end() -> None:
    assert agreements([make_run("mlx-lm", 0, 1, 1)]) == []
    assert ratios(RUNS[:4]) == []


def test_notes_name_unbatched_sides_and_uncached_tokens() -> None:
    sides = [NamedSide("kimi-mlx", None), NamedSide("mlx-lm tensor", "no batches")]
    runs = [make_run("kimi-mlx", 0, 1, 1, case=Case(50, 100, 2), cached=20)]
    assert notes(RUNS, sides) == []  # pyright: ignore[reportArgumentType]
    assert notes(runs, sides) == [  # pyright: ignore[reportArgumentType]
        "mlx-lm tensor: concurrent requests did not run as a batch: no batches",
        "kimi-mlx: up to 30 tokens of the depth were not cached but timed",
    ]


def test_notes_count_draft_tokens_of_measured_runs() -> None:
    warmup, run = (make_run("kimi-mlx", repetition, 1, 1) for repetition in (-1, 0))
    for each in (warmup, run):
        for answer in each.answers:
            object.__setattr__(answer.statistics, "drafted_tokens", 10)
            object.__setattr__(answer.statistics, "accepted_tokens", 4)
            object.__setattr__(answer.statistics, "drafts_off", "too slow")
    assert notes([warmup, run], []) == [
        "kimi-mlx: 4 of 10 draft tokens accepted; drafts off at the end of 1 of 1 answers: too slow"
    ]
