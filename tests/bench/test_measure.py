"""The benchmark's plan, and the order in which sides run."""

from __future__ import annotations

import pytest

from kimi_mlx.bench.measure import BenchmarkPlan, Case, Run, measure
from kimi_mlx.bench.sides import BatchResult, RequestBatch, TimedAnswer
from kimi_mlx.engine.events import Statistics
from kimi_mlx.errors import UsageError

Log = list[tuple[str, RequestBatch]]


class CountingSide:
    """A side that counts up from the prompt's first token, and logs each batch."""

    def __init__(self, name: str, log: Log):
        self.name = name
        self.not_batched_because: str | None = None
        self._log = log

    def run(self, batch: RequestBatch) -> BatchResult:
        self._log.append((self.name, batch))
        count = batch.requests[0].max_tokens or 0
        answers = [
            TimedAnswer(
                tuple(request.prompt[0] + step for step in range(count)),
                Statistics(len(request.prompt), batch.depth, count, 0.5, 1.0, 1000),
                tuple(0.5 + step for step in range(count)),
            )
            for request in batch.requests
        ]
        return BatchResult(tuple(answers), 100.0, (1000,))


def run_plan(plan: BenchmarkPlan, names: str = "ab") -> tuple[list[Run], Log]:
    log: Log = []
    return list(measure([CountingSide(name, log) for name in names], plan, vocab_size=50)), log


def test_sides_alternate_with_the_same_prompts() -> None:
    _, log = run_plan(BenchmarkPlan((4,), 2, warmup=0, repeat=4))
    assert "".join(name for name, _ in log) == "abbaabba"
    prompts = [batch.requests[0].prompt for _, batch in log]
    assert prompts[0::2] == prompts[1::2]
    assert len(set(prompts)) == 4


def test_every_case_is_warmed_up() -> None:
    runs, _ = run_plan(BenchmarkPlan((4, 9), 3, warmup=2, repeat=1, depth=(0, 5), concurrency=(1, 2)), "a")
    cases = [Case(depth, prompt, count) for depth in (0, 5) for prompt in (4, 9) for count in (1, 2)]
    assert [(run.case, run.is_warmup) for run in runs] == [
        (case, is_warmup) for case in cases for is_warmup in (True, True, False)
    ]


def test_requests_of_a_batch_share_only_the_prefix() -> None:
    _, log = run_plan(BenchmarkPlan((8,), 3, warmup=0, repeat=2, depth=(20,), concurrency=(3,)), "a")
    (_, first), (_, second) = log
    prompts = [request.prompt for request in first.requests]
    assert {len(prompt) for prompt in prompts} == {28}
    assert {prompt[:20] for prompt in prompts} == {first.prefix}
    assert len({prompt[20:] for prompt in prompts}) == 3
    assert first.prefix == second.prefix  # sides keep it
    assert first.requests[0].prompt != second.requests[0].prompt


def test_generation_is_greedy_and_has_no_stop() -> None:
    _, log = run_plan(BenchmarkPlan((4,), 7, warmup=0, repeat=1), "a")
    request = log[0][1].requests[0]
    assert request.max_tokens == 7
    assert request.sampling.temperature == 0
    assert request.stop_ids == frozenset()


def test_energy_is_measured_for_the_time_of_the_batch() -> None:
    side = CountingSide("a", [])
    plan = BenchmarkPlan((4,), 3, warmup=0, repeat=1)
    (run,) = measure([side], plan, 50, lambda start, end: end - start)
    assert run.energy_j == run.outcome.wall_s == 2.5


def test_total_is_the_number_of_batches() -> None:
    plan = BenchmarkPlan((4, 9), 3, warmup=2, repeat=3, concurrency=(1, 2))
    assert len(run_plan(plan, "a")[0]) == plan.total == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_tokens": ()}, "at least 1 token"),
        ({"prompt_tokens": (128, 0)}, "at least 1 token"),
        ({"generation_tokens": 1}, "cannot time decode"),
        ({"repeat": 0}, "at least 1"),
        ({"warmup": -1}, "warm-ups"),
        ({"depth": (-1,)}, "at least 0"),
        ({"concurrency": (1, 0)}, "concurrency 1,0 is not between 1 and 64"),
        ({"concurrency": (65,)}, "not between 1 and 64"),
    ],
)
def test_an_invalid_plan_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BenchmarkPlan(**arguments)  # pyright: ignore[reportArgumentType]


def test_a_plan_that_exceeds_the_context_is_refused_with_both_numbers() -> None:
    plan = BenchmarkPlan((128, 512), 64, depth=(0, 1000))
    plan.check_context(1576)
    with pytest.raises(UsageError, match="need 1576 tokens, but the model's context has 1575"):
        plan.check_context(1575)
