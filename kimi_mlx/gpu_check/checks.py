"""The checks, their sizes and their results. Does not import MLX."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Device = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Check:
    """One check, which runs in a process of its own.

    Args:
        name: name of the module in kimi_mlx.gpu_check that has the function `check`.
        title: description of the check.
        limit_s: time limit, for checks that hang. A GPU needs a small part of it.
    """

    name: str
    title: str
    limit_s: float = 300.0


CHECKS = (
    Check("logits", "logits against the CPU in float32", 900.0),
    Check("rotations", "rotary embedding, both forms"),
    Check("attention", "fused against blockwise attention", 600.0),
    Check("vision", "vision tower against the CPU in float32", 600.0),
    Check("batches", "batches of unequal length"),
    Check("streaming", "streamed experts against all in memory", 600.0),
    Check("draft", "draft model against the CPU in float32", 600.0),
    Check("compiled", "compiled functions against plain ones"),
    Check("cache_blocks", "blocks of the prompt cache in bfloat16"),
    Check("two_ranks", "two ranks: hybrid and pipeline"),
    Check("unload", "memory after unloading"),
    Check("timings", "times and memory", 900.0),
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of what the checks compute.

    Args:
        has_k2_widths: True for the widths of K2, False for small widths, for a CPU.
        num_experts: number of routed experts of the random model; K2 has 384.
        prompts: lengths of prompts.
        attention_totals: numbers of keys in attention.
        contexts: numbers of cached tokens of a timed decode step.
        prefill: number of prompt tokens of a timed prefill.
        repeats: number of timed runs.
        image_patches: numbers of patches in attention of the vision tower.
        images: frames, rows and columns of patches of the images that are encoded at once.
        timed_image: frames, rows and columns of patches of the image whose encoding is timed.
    """

    has_k2_widths: bool
    num_experts: int
    prompts: tuple[int, ...]
    attention_totals: tuple[int, ...]
    contexts: tuple[int, ...]
    prefill: int
    repeats: int
    image_patches: tuple[int, ...]
    images: tuple[tuple[int, int, int], ...]
    timed_image: tuple[int, int, int]


FULL = Sizes(
    has_k2_widths=True,
    num_experts=24,
    prompts=(1, 7, 9, 64, 700),
    attention_totals=(9, 512, 4097),
    contexts=(1024, 32_768),
    prefill=4096,
    repeats=20,
    image_patches=(4, 12, 512, 4098),
    images=((1, 2, 2), (1, 34, 40), (4, 6, 8)),
    timed_image=(1, 56, 74),  # 1024 x 768 pixels
)
SMALL = Sizes(
    has_k2_widths=False,
    num_experts=12,
    prompts=(1, 7, 9, 70),
    attention_totals=(9, 130),
    contexts=(64, 600),
    prefill=256,
    repeats=2,
    image_patches=(4, 12, 130),
    images=((1, 2, 2), (1, 6, 10), (4, 2, 4)),
    timed_image=(1, 6, 8),
)
"""For tests on a CPU."""


@dataclass(frozen=True)
class Comparison:
    """A value that must not exceed a limit.

    Args:
        name: name of the compared value.
        error: relative error; for a condition 0 if it holds, else infinite.
        limit: largest error that counts as correct.
    """

    name: str
    error: float
    limit: float

    @property
    def is_ok(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Measurement:
    """A measured number, such as 1.2 ms.

    Args:
        group: name of the measured quantity, such as `decode step`; its measurements have the same unit.
        name: case, such as `1024 cached`.
        value: the number.
        unit: its unit.
    """

    group: str
    name: str
    value: float
    unit: str


State = Literal["ok", "failed", "error", "timeout", "skipped"]


@dataclass
class CheckResult:
    """Result of a check.

    Args:
        check: the check.
        state: `ok`; `failed` if a comparison is beyond its limit; `error` if it could not be finished.
        comparisons: all comparisons so far.
        measurements: all measurements so far.
        message: the error, or the reason for skipping.
        seconds: duration.
    """

    check: Check
    state: State = "ok"
    comparisons: list[Comparison] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    message: str = ""
    seconds: float = 0.0

    @property
    def worst(self) -> Comparison | None:
        """The comparison that is closest to its limit, or farthest beyond it."""
        return max(self.comparisons, key=_limit_fraction, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON, in which infinity and NaN are strings."""
        return {
            "name": self.check.name,
            "title": self.check.title,
            "state": self.state,
            "message": self.message,
            "seconds": round(self.seconds, 2),
            "comparisons": [
                {**asdict(comparison), "error": _finite(comparison.error), "ok": comparison.is_ok}
                for comparison in self.comparisons
            ],
            "measurements": [asdict(measurement) for measurement in self.measurements],
        }


def _limit_fraction(comparison: Comparison) -> float:
    """Return the error as a fraction of its limit; NaN counts as infinite."""
    fraction = comparison.error / comparison.limit if comparison.limit else math.inf * bool(comparison.error)
    return math.inf if math.isnan(fraction) else fraction


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
