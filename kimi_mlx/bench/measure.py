"""Run a benchmark. Sides alternate in every repetition, so that interference affects all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kimi_mlx.bench.sides import BatchResult, RequestBatch, Side, TimedAnswer
from kimi_mlx.bench.workloads import random_prompt
from kimi_mlx.engine.request import ImageInput, Request, Sampling
from kimi_mlx.errors import UsageError
from kimi_mlx.images.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from kimi_mlx.images.resize import MERGE, grid_size, resized_size
from kimi_mlx.units import format_count

GREEDY = Sampling(temperature=0.0, seed=0)

MAX_CONCURRENCY = 64
MAX_IMAGES = 100

EnergyOf = Callable[[float, float], float | None]
"""Returns the joules between two times of time.perf_counter; None if they are not known."""


@dataclass(frozen=True, order=True)
class Case:
    """One combination to measure.

    Args:
        depth: number of tokens in the cache before the clock starts.
        prompt_tokens: number of new tokens of each prompt.
        concurrency: number of concurrent requests.
        images: number of images before the prompt.
    """

    depth: int
    prompt_tokens: int
    concurrency: int
    images: int = 0

    def __str__(self) -> str:
        """Describe the case, such as `prompt 128, depth 8192, 1 image, 4 at once`."""
        depth = f", depth {self.depth}" if self.depth else ""
        images = f", {format_count(self.images, 'image')}" if self.images else ""
        at_once = f", {self.concurrency} at once" if self.concurrency > 1 else ""
        return f"prompt {self.prompt_tokens}{depth}{images}{at_once}"


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
        images: numbers of images before each prompt.
        image_size: width and height of the images, in pixels.
        preprocessing: settings by which the model shrinks images.

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
    images: tuple[int, ...] = (0,)
    image_size: tuple[int, int] = (1024, 768)
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING

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
            raise UsageError(
                f"repetitions must be at least 1, warm-ups and the seed at least 0, not {self.repeat}, {self.warmup} "
                f"and {self.seed}",
                hint="for example --repeat 5 --warmup 1 --seed 0",
            )
        if not self.depth or min(self.depth) < 0:
            raise UsageError("the depth (cached tokens) must be at least 0", hint="for example --depth 0,8192")
        if not self.concurrency or min(self.concurrency) < 1 or max(self.concurrency) > MAX_CONCURRENCY:
            raise UsageError(
                f"concurrency {','.join(map(str, self.concurrency))} is not between 1 and {MAX_CONCURRENCY}",
                hint="for example --concurrency 1,4",
            )
        if not self.images or min(self.images) < 0 or max(self.images) > MAX_IMAGES:
            raise UsageError(
                f"{','.join(map(str, self.images))} images are not between 0 and {MAX_IMAGES}",
                hint="for example --images 1,4",
            )

    @property
    def has_images(self) -> bool:
        """Whether there are cases with images."""
        return any(self.images)

    @property
    def image_tokens(self) -> int:
        """Number of tokens of one image."""
        limits = self.preprocessing
        rows, columns = grid_size(
            *resized_size(*self.image_size, limits.in_patch_limit, limits.patch_limit_on_one_side)
        )
        return rows * columns // MERGE**2

    def check_context(self, context: int) -> None:
        """Raise UsageError if a case does not fit in a model's context."""
        depth, prompt = max(self.depth), max(self.prompt_tokens) + max(self.images) * self.image_tokens
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
            Case(depth, prompt_tokens, concurrency, images)
            for images, depth, prompt_tokens, concurrency in itertools.product(
                self.images, self.depth, self.prompt_tokens, self.concurrency
            )
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
        image_tokens: number of image tokens in each prompt.
    """

    side: str
    case: Case
    repetition: int
    outcome: BatchResult
    energy_j: float | None = None
    image_tokens: int = 0

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
            "image_tokens": self.image_tokens,
            "requests": [
                {**answer.statistics.to_dict(), "arrivals_s": [round(arrival, 6) for arrival in answer.arrivals_s]}
                for answer in self.answers
            ],
        }


def measure(
    sides: Sequence[Side],
    plan: BenchmarkPlan,
    vocab_size: int,
    energy_of: EnergyOf | None = None,
    placeholder_id: int = 0,
) -> Iterator[Run]:
    """Run the plan on all sides, and yield each run.

    Args:
        sides: the sides, loaded and idle.
        plan: the plan.
        vocab_size: upper bound of the random prompt ids.
        energy_of: energy of this machine, if it can be measured.
        placeholder_id: id of the token that the features of an image replace.
    """
    for case, repetition, ordered_sides in _schedule(sides, plan):
        batch = make_batch(case, repetition + plan.warmup, plan, vocab_size, placeholder_id)
        for side in ordered_sides:
            outcome = side.run(batch)
            end = outcome.started_at + outcome.wall_s
            energy = None if energy_of is None else energy_of(outcome.started_at, end)
            yield Run(side.name, case, repetition, outcome, energy, case.images * plan.image_tokens)


def make_batch(
    case: Case, repetition: int, plan: BenchmarkPlan, vocab_size: int, placeholder_id: int = 0
) -> RequestBatch:
    """Return the requests of one repetition: a shared random prefix, then images and a random prompt each.

    All repetitions and cases of a depth have the same prefix, so that sides need not fill their caches each time.
    """
    prefix = random_prompt(vocab_size, case.depth, 0, plan.seed)
    requests: list[Request] = []
    for number in range(1, case.concurrency + 1):
        images = _make_images(case, repetition, plan, number)
        pads = sum(image.num_tokens for image in images) * (placeholder_id,)
        prompt = (*prefix, *pads, *random_prompt(vocab_size, case.prompt_tokens, repetition, plan.seed, number))
        requests.append(Request(prompt, plan.generation_tokens, GREEDY, images=images))
    return RequestBatch(tuple(requests), case.depth)


def _make_images(case: Case, repetition: int, plan: BenchmarkPlan, request: int) -> tuple[ImageInput, ...]:
    """Return new pictures for one request, which follow the prefix."""
    if not case.images:
        return ()
    from kimi_mlx.bench.pictures import make_picture  # PIL: not for text

    images: list[ImageInput] = []
    for number in range(case.images):
        picture = make_picture(plan.image_size, (plan.seed, repetition, request, number), plan.preprocessing)
        start = images[-1].stop if images else case.depth
        images.append(ImageInput(start, picture.num_tokens, picture.grid, picture.digest, picture.patches))
    return tuple(images)


def _schedule(sides: Sequence[Side], plan: BenchmarkPlan) -> Iterator[tuple[Case, int, Sequence[Side]]]:
    """Yield case, repetition, and the order of the sides, which alternates so that no side has an advantage."""
    for case in plan.cases:
        for repetition in range(-plan.warmup, plan.repeat):
            yield case, repetition, sides if repetition % 2 == 0 else sides[::-1]
