"""Run a benchmark. Sides alternate in every repetition, so that interference affects all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kimi_mlx.bench.sides import BatchResult, RequestBatch, Side, TimedAnswer
from kimi_mlx.bench.workloads import random_prompt
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import UsageError

GREEDY = Sampling(temperature=0.0, seed=0)

MAX_CONCURRENCY = 64

EnergyOf = Callable[[float, float], float | None]
"""Return the joules between two times of time.perf_counter; None if they are not known."""


@dataclass(frozen=True, order=True)
class Case:
    """One combination to measure.

    Args:
        depth: number of tokens in the cache before the clock starts.
        prompt_tokens: number of new tokens of each prompt.
        concurrency: number of concurrent requests.
    """

    depth: int
    prompt_tokens: int
    concurrency: int

    def __str__(self) -> str:
        """Describe the case, such as `prompt 128 after 8192, 4 at once`."""
        depth = f" after {self.depth}" if self.depth else ""
        return f"prompt {self.prompt_tokens}{depth}" + (f", {self.concurrency} at once" * (self.concurrency > 1))


@dataclass(frozen=True)
class BenchmarkPlan:
    """All combinations of prompt size, depth and concurrency to measure.

    Args:
        prompt_tokens: sizes of prompts.
        generation_tokens: number of new tokens per request; at least 2, since decode is timed after the first.
        warmup: number of uncounted repetitions of each case.
        repeat: number of counted repetitions.
        seed: random seed of the prompts.
        depth: numbers of tokens in the cache before the prompt.
        concurrency: numbers of concurrent requests.

    Raises:
        UsageError: a number out of its range.
    """

    prompt_tokens: tuple[int, ...] = (128, 512)
    generation_tokens: int = 64
    warmup: int = 1
    repeat: int = 5
    seed: int = 0
    depth: tuple[int, ...] = (0,)
    concurrency: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.prompt_tokens or min(self.prompt_tokens) < 1:
            raise UsageError("a prompt needs at least 1 token", hint="for example --prompt-tokens 128,512")
        if self.generation_tokens < 2:
            raise UsageError(
                f"cannot time decode with {self.generation_tokens} generated tokens: it starts after the first one",
                hint="use --generation-tokens 2 or more",
            )
        if self.repeat < 1 or self.warmup < 0 or self.seed < 0:
            raise UsageError("repetitions must be at least 1, warm-ups and the seed at least 0")
        if not self.depth or min(self.depth) < 0:
            raise UsageError("the depth (cached tokens) must be at least 0", hint="for example --depth 0,8192")
        if not self.concurrency or min(self.concurrency) < 1 or max(self.concurrency) > MAX_CONCURRENCY:
            raise UsageError(
                f"concurrency {','.join(map(str, self.concurrency))} is not between 1 and {MAX_CONCURRENCY}",
                hint="for example --concurrency 1,4",
            )

    def check_context(self, context: int) -> None:
        """Raise UsageError if a case does not fit in a model's context."""
        depth, prompt = max(self.depth), max(self.prompt_tokens)
        longest = depth + prompt + self.generation_tokens
        if longest > context:
            raise UsageError(
                f"depth {depth}, prompt {prompt} and answer {self.generation_tokens} need {longest} tokens, "
                f"but the model's context has {context}",
                hint="use smaller --prompt-tokens" + " or --depth" * (depth > 0),
            )

    @property
    def cases(self) -> list[Case]:
        """All cases in the order of measurement."""
        return [
            Case(*combination) for combination in itertools.product(self.depth, self.prompt_tokens, self.concurrency)
        ]

    @property
    def total(self) -> int:
        """Number of batches per side."""
        return len(self.cases) * (self.warmup + self.repeat)


@dataclass(frozen=True)
class Run:
    """One batch on one side.

    Args:
        side: name of the side.
        case: the case.
        repetition: number of the repetition, from 0; negative for warm-ups.
        outcome: result of the batch.
        energy_j: energy that this machine used during the batch; None if not known.
    """

    side: str
    case: Case
    repetition: int
    outcome: BatchResult
    energy_j: float | None = None

    @property
    def is_warmup(self) -> bool:
        """Whether the run is not counted."""
        return self.repetition < 0

    @property
    def answers(self) -> tuple[TimedAnswer, ...]:
        """Answers of the batch."""
        return self.outcome.answers

    @property
    def new_tokens(self) -> int:
        """Number of new tokens of all answers."""
        return sum(len(answer.ids) for answer in self.answers)

    def to_dict(self) -> dict[str, Any]:
        """Return the run for JSON, without token ids."""
        return {
            "side": self.side,
            **asdict(self.case),
            "is_warmup": self.is_warmup,
            "repetition": self.repetition,
            "wall_s": self.outcome.wall_s,
            "peak_memory_bytes": list(self.outcome.peak_memory_bytes),
            "energy_j": self.energy_j,
            "requests": [
                {**answer.statistics.to_dict(), "arrivals_s": [round(arrival, 6) for arrival in answer.arrivals_s]}
                for answer in self.answers
            ],
        }


def measure(
    sides: Sequence[Side], plan: BenchmarkPlan, vocab_size: int, energy_of: EnergyOf | None = None
) -> Iterator[Run]:
    """Run the plan on all sides, and yield each run.

    Args:
        sides: the sides, loaded and idle.
        plan: the plan.
        vocab_size: upper bound of the random prompt ids.
        energy_of: energy of this machine, if it can be measured.
    """
    for case, repetition, ordered_sides in _schedule(sides, plan):
        batch = make_batch(case, repetition + plan.warmup, plan, vocab_size)
        for side in ordered_sides:
            outcome = side.run(batch)
            end = outcome.started_at + outcome.wall_s
            energy = None if energy_of is None else energy_of(outcome.started_at, end)
            yield Run(side.name, case, repetition, outcome, energy)


def make_batch(case: Case, repetition: int, plan: BenchmarkPlan, vocab_size: int) -> RequestBatch:
    """Return the requests of one repetition: a shared random prefix, then a random prompt each."""
    prefix = random_prompt(vocab_size, case.depth, repetition, plan.seed)
    prompts = [
        (*prefix, *random_prompt(vocab_size, case.prompt_tokens, repetition, plan.seed, number))
        for number in range(1, case.concurrency + 1)
    ]
    return RequestBatch(tuple(Request(prompt, plan.generation_tokens, GREEDY) for prompt in prompts), case.depth)


def _schedule(sides: Sequence[Side], plan: BenchmarkPlan) -> Iterator[tuple[Case, int, Sequence[Side]]]:
    """Yield case, repetition, and the order of the sides, which alternates so that no side has an advantage."""
    for case in plan.cases:
        for repetition in range(-plan.warmup, plan.repeat):
            yield case, repetition, sides if repetition % 2 == 0 else sides[::-1]
