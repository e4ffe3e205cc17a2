"""The measurement: sides take turns, repetition by repetition, so that a disturbed machine disturbs all."""

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
"""Joules between two times of time.perf_counter, None where they are not known."""


@dataclass(frozen=True, order=True)
class Case:
    """What is measured at a time.

    Args:
        depth: tokens that are in the cache before the clock starts.
        prompt_tokens: new tokens of each prompt.
        concurrency: requests at once.
    """

    depth: int
    prompt_tokens: int
    concurrency: int

    def __str__(self) -> str:
        """In words, such as `prompt 128 after 8192, 4 at once`."""
        depth = f" after {self.depth}" if self.depth else ""
        return f"prompt {self.prompt_tokens}{depth}" + (f", {self.concurrency} at once" * (self.concurrency > 1))


@dataclass(frozen=True)
class BenchmarkPlan:
    """What to measure: every combination of prompt size, depth and concurrency.

    Args:
        prompt_tokens: sizes of prompts.
        generation_tokens: new tokens after each prompt; at least 2, since decode is timed after the first.
        warmup: repetitions that are run and not counted, for each case.
        repeat: repetitions that count.
        seed: of the prompts.
        depth: tokens in the cache before.
        concurrency: requests at once.

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
                f"{self.generation_tokens} generated tokens are too few: decode is timed after the first one",
                hint="use --generation-tokens 2 or more",
            )
        if self.repeat < 1 or self.warmup < 0 or self.seed < 0:
            raise UsageError("repetitions start at 1, warm-ups and the seed at 0")
        if not self.depth or min(self.depth) < 0:
            raise UsageError("a depth is the tokens before the prompt, 0 or more", hint="for example --depth 0,8192")
        if not self.concurrency or min(self.concurrency) < 1 or max(self.concurrency) > MAX_CONCURRENCY:
            raise UsageError(
                f"{','.join(map(str, self.concurrency))} requests at once are not from 1 to {MAX_CONCURRENCY} each",
                hint="for example --concurrency 1,4",
            )

    def check_context(self, context: int) -> None:
        """Refuse what does not fit into a model's context."""
        depth, prompt = max(self.depth), max(self.prompt_tokens)
        longest = depth + prompt + self.generation_tokens
        if longest > context:
            raise UsageError(
                f"depth {depth}, prompt {prompt} and answer {self.generation_tokens} take {longest} tokens, "
                f"the model's context holds {context}",
                hint="use smaller --prompt-tokens" + " or --depth" * (depth > 0),
            )

    @property
    def cases(self) -> list[Case]:
        """In the order in which they are measured."""
        return [Case(*each) for each in itertools.product(self.depth, self.prompt_tokens, self.concurrency)]

    @property
    def total(self) -> int:
        """Batches a side."""
        return len(self.cases) * (self.warmup + self.repeat)


@dataclass(frozen=True)
class Run:
    """One batch of one side.

    Args:
        side: its name.
        case: what was measured.
        repetition: from 0; warm-ups are numbered before them, below 0.
        outcome: what came of it.
        energy_j: of this machine meanwhile, None where that is not known.
    """

    side: str
    case: Case
    repetition: int
    outcome: BatchResult
    energy_j: float | None = None

    @property
    def is_warmup(self) -> bool:
        """Whether it does not count."""
        return self.repetition < 0

    @property
    def answers(self) -> tuple[TimedAnswer, ...]:
        """Of the outcome."""
        return self.outcome.answers

    @property
    def new_tokens(self) -> int:
        """Of all answers."""
        return sum(len(answer.ids) for answer in self.answers)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the ids."""
        return {
            "side": self.side,
            **asdict(self.case),
            "is_warmup": self.is_warmup,
            "repetition": self.repetition,
            "wall_s": self.outcome.wall_s,
            "peak_memory_bytes": list(self.outcome.peak_memory_bytes),
            "energy_j": self.energy_j,
            "requests": [
                {**answer.statistics.to_dict(), "arrivals_s": [round(each, 6) for each in answer.arrivals_s]}
                for answer in self.answers
            ],
        }


def measure(
    sides: Sequence[Side], plan: BenchmarkPlan, vocab_size: int, energy_of: EnergyOf | None = None
) -> Iterator[Run]:
    """Run the plan on all sides, and yield what comes of each batch.

    Args:
        sides: loaded and idle.
        plan: what to run.
        vocab_size: prompts are random ids below it.
        energy_of: joules of this machine, where they are known.
    """
    for case, repetition, turn in _turns(sides, plan):
        batch = make_batch(case, repetition + plan.warmup, plan, vocab_size)
        for side in turn:
            outcome = side.run(batch)
            end = outcome.started_at + outcome.wall_s
            energy = None if energy_of is None else energy_of(outcome.started_at, end)
            yield Run(side.name, case, repetition, outcome, energy)


def make_batch(case: Case, repetition: int, plan: BenchmarkPlan, vocab_size: int) -> RequestBatch:
    """The requests of one repetition: a random prefix that they share, and a random prompt each."""
    prefix = random_prompt(vocab_size, case.depth, repetition, plan.seed)
    prompts = [
        (*prefix, *random_prompt(vocab_size, case.prompt_tokens, repetition, plan.seed, number))
        for number in range(1, case.concurrency + 1)
    ]
    return RequestBatch(tuple(Request(prompt, plan.generation_tokens, GREEDY) for prompt in prompts), case.depth)


def _turns(sides: Sequence[Side], plan: BenchmarkPlan) -> Iterator[tuple[Case, int, Sequence[Side]]]:
    """Case, repetition and order of the sides, which turns around each time so that none profits."""
    for case in plan.cases:
        for repetition in range(-plan.warmup, plan.repeat):
            yield case, repetition, sides if repetition % 2 == 0 else sides[::-1]
