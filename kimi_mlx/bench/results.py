"""From runs to figures: medians, spread, percentiles, ratios, whether the texts agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from kimi_mlx.bench.machine import OURS
from kimi_mlx.bench.measure import Case, Run
from kimi_mlx.bench.sides import Side

ShareOf = Callable[[Case, float], float | None]
"""The share of the roofline at so many decoded tokens a second."""

RATES = ("prefill_tok_per_s", "decode_tok_per_s", "aggregate_tok_per_s")


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of a figure."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Percentiles:
    """Of a time: half of all values are at most p50, 90 % at most p90; between two values by the line."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Of at least one value."""
        return cls(*(float(each) for each in np.percentile(values, (50, 90, 99))))


@dataclass(frozen=True)
class ResultRow:
    """The figures of one side in one case.

    Args:
        side: its name.
        case: what was measured.
        generation_tokens: of each answer.
        rates: by the keys of RATES. Prefill and decode are of single requests, by the side's own clock; aggregate is
            all new tokens of a batch over its wall time.
        ttft_s: from the batch handed over until a request's first token is here.
        between_tokens_s: from one token of a request here until its next.
        peak_memory_bytes: of each rank, the median.
        joules_per_token: of this machine for each new token, prefill included; None where it is not known.
        roofline_share: of the memory's bandwidth that decode uses; None where it has no meaning.
    """

    side: str
    case: Case
    generation_tokens: int
    rates: dict[str, Spread]
    ttft_s: Percentiles
    between_tokens_s: Percentiles
    peak_memory_bytes: tuple[int, ...]
    joules_per_token: float | None
    roofline_share: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self)
        return {"side": values.pop("side"), **values.pop("case"), **values.pop("rates"), **values}


@dataclass(frozen=True)
class SpeedRatio:
    """kimi-mlx against the best other side in one figure: a quotient of medians, above 1 where kimi-mlx is faster.

    Args:
        case: what was measured.
        figure: one of RATES: prefill and decode of single requests, the aggregate of several at once.
        ratio: the quotient.
        against: the side that was the best.
    """

    case: Case
    figure: str
    ratio: float
    against: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self)
        return {**values.pop("case"), **values}


@dataclass(frozen=True)
class TokenAgreement:
    """Whether another side generated the same tokens as kimi-mlx.

    Args:
        side: the other side.
        answers: how many were compared, warm-ups included.
        equal: how many were equal in every token.
        first_difference: the smallest position of a differing token, None if there is none.
    """

    side: str
    answers: int
    equal: int
    first_difference: int | None


def rows(runs: Sequence[Run], share_of: ShareOf | None = None) -> list[ResultRow]:
    """The figures of each case and side, in the order in which they were first run, ours before others."""
    cases = list(dict.fromkeys(run.case for run in runs))
    sides = sorted(dict.fromkeys(run.side for run in runs), key=lambda side: side != OURS)
    groups = [
        [run for run in runs if (run.case, run.side) == (case, side) and not run.is_warmup]
        for case in cases
        for side in sides
    ]
    return [_row(group, share_of) for group in groups if group]


def _row(runs: Sequence[Run], share_of: ShareOf | None) -> ResultRow:
    answers = [answer for run in runs for answer in run.answers]
    rates = {
        "prefill_tok_per_s": Spread.of([answer.statistics.prefill_tok_per_s for answer in answers]),
        "decode_tok_per_s": Spread.of([answer.statistics.decode_tok_per_s for answer in answers]),
        "aggregate_tok_per_s": Spread.of([run.new_tokens / run.outcome.wall_s for run in runs]),
    }
    gaps = [gap for answer in answers for gap in np.diff(answer.arrivals_s)]
    joules = [run.energy_j / run.new_tokens for run in runs if run.energy_j is not None]
    peaks = zip(*(run.outcome.peak_memory_bytes for run in runs), strict=True)
    return ResultRow(
        runs[0].side,
        runs[0].case,
        len(answers[0].ids),
        rates,
        Percentiles.of([answer.arrivals_s[0] for answer in answers]),
        Percentiles.of(gaps),
        tuple(round(median(each)) for each in peaks),
        median(joules) if joules else None,
        None if share_of is None else share_of(runs[0].case, rates["decode_tok_per_s"].median),
    )


def ratios(table_rows: Sequence[ResultRow]) -> list[SpeedRatio]:
    """kimi-mlx against the best of the others, for each case; empty without others."""
    found: list[SpeedRatio] = []
    for ours in (row for row in table_rows if row.side == OURS):
        others = [row for row in table_rows if row.side != OURS and row.case == ours.case]
        for figure in (RATES[2:] if ours.case.concurrency > 1 else RATES[:2]) if others else ():
            best = max(others, key=lambda row, figure=figure: row.rates[figure].median)
            ratio = ours.rates[figure].median / best.rates[figure].median
            found.append(SpeedRatio(ours.case, figure, ratio, best.side))
    return found


def agreements(runs: Sequence[Run]) -> list[TokenAgreement]:
    """Compare the tokens of every other side with those of kimi-mlx, answer by answer."""
    ours = {(run.case, run.repetition): run.answers for run in runs if run.side == OURS}
    found: list[TokenAgreement] = []
    for side in dict.fromkeys(run.side for run in runs if run.side != OURS):
        pairs = [
            (mine.ids, other.ids)
            for run in runs
            if run.side == side and (run.case, run.repetition) in ours
            for mine, other in zip(ours[run.case, run.repetition], run.answers, strict=True)
        ]
        positions = [position for pair in pairs if (position := _first_difference(*pair)) is not None]
        if pairs:
            found.append(TokenAgreement(side, len(pairs), len(pairs) - len(positions), min(positions, default=None)))
    return found


def _first_difference(one: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    if one == other:
        return None
    shared = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(shared) if a != b), min(len(one), len(other)))


def notes(runs: Sequence[Run], sides: Sequence[Side]) -> list[str]:
    """What a reader must know of these runs: requests that were not run together, prefixes that were not kept."""
    found: list[str] = []
    if any(run.case.concurrency > 1 for run in runs):
        found += [f"{side.name}: requests at once were no batch: {side.turns}" for side in sides if side.turns]
    for side in sides:
        lost = [
            run.case.depth - answer.statistics.cached_tokens
            for run in runs
            if run.side == side.name
            for answer in run.answers
        ]
        if max(lost, default=0) > 0:
            found.append(f"{side.name}: up to {max(lost)} tokens of the depth were not in its cache, and were timed")
    return found
