"""Statistics of the runs: medians, spread, percentiles, speed ratios, and whether the tokens agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from statistics import median
from typing import Any

import numpy as np

from kimi_mlx.bench.machine import OURS
from kimi_mlx.bench.measure import Case, Run
from kimi_mlx.bench.sides import Side
from kimi_mlx.engine.events import Statistics
from kimi_mlx.model.expert_stats import ExpertStats

ShareOf = Callable[[Case, float], float | None]
"""Returns the share of the roofline at a decode rate."""

RATES = ("prefill_tok_per_s", "decode_tok_per_s", "aggregate_tok_per_s")


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of a time, with linear interpolation."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Return the percentiles of at least one value."""
        return cls(*(float(value) for value in np.percentile(values, (50, 90, 99))))


@dataclass(frozen=True)
class Encoding:
    """Figures of prompts with images, by the side's own clock.

    Args:
        image_tokens: number of image tokens in each prompt.
        encode_s: time of the vision tower for a prompt.
        encode_tok_per_s: image tokens per second of that time.
        prefill_s: rest of the time to the first token.
    """

    image_tokens: int
    encode_s: Spread
    encode_tok_per_s: Spread
    prefill_s: Spread


@dataclass(frozen=True)
class ExpertFigures:
    """Experts that were read from the SSD of the first rank, over all answers of a case.

    Reads of a step count for each answer that it belongs to.

    Args:
        hit_rate: share of the needed experts that had been in memory, after the first token.
        read_bytes_per_token: bytes read for each token after the first.
        wait_share: share of the time after the first token that steps waited for reads.
        wait_s_per_token: that time for each token.
        guesses_right: share of the experts that were read before the router had chosen them, and then were chosen; None
            without such reads.
        prompt_read_bytes: median of the bytes that were read until the first token.
    """

    hit_rate: float
    read_bytes_per_token: float
    wait_share: float
    wait_s_per_token: float
    guesses_right: float | None
    prompt_read_bytes: int

    @classmethod
    def of(cls, statistics: Sequence[Statistics]) -> ExpertFigures | None:
        """Return the figures of answers; None if nothing is read from the SSD."""
        counted = [(answer.experts, answer) for answer in statistics if answer.experts is not None]
        total = reduce(ExpertStats.with_earlier, (experts for experts, _ in counted), ExpertStats())
        num_tokens = sum(answer.generated_tokens - 1 for _, answer in counted)
        seconds = sum(answer.decode_s for _, answer in counted)
        if total.hit_rate is None or not num_tokens or not seconds:
            return None
        return cls(
            total.hit_rate,
            total.bytes_read / num_tokens,
            min(total.wait_seconds / seconds, 1.0),
            total.wait_seconds / num_tokens,
            total.guesses_right / total.guesses if total.guesses else None,
            round(median(answer.prompt_read_bytes for _, answer in counted)),
        )


@dataclass(frozen=True)
class ResultRow:
    """Statistics of one side in one case.

    Args:
        side: name of the side.
        case: the case.
        generation_tokens: number of new tokens per answer.
        rates: rates by the keys of RATES. Prefill and decode are of single requests, by the side's own clock; aggregate
            is all new tokens of a batch over its wall time.
        ttft_s: time from the start of the batch to the first token of a request.
        between_tokens_s: time between two tokens of a request.
        peak_memory_bytes: median for each rank.
        joules_per_token: energy of this machine per new token, including prefill; None if not known.
        roofline_share: share of the memory bandwidth that decode uses; None if not applicable.
        encoding: figures of the images; None without images.
        experts: figures of the experts that were read from the SSD; None if all are in memory.
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
    encoding: Encoding | None = None
    experts: ExpertFigures | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        values = asdict(self)
        return {"side": values.pop("side"), **values.pop("case"), **values.pop("rates"), **values}


@dataclass(frozen=True)
class SpeedRatio:
    """Speed of kimi-mlx relative to the best other side: a quotient of medians, above 1 if kimi-mlx is faster.

    Args:
        case: the case.
        figure: one of RATES: prefill and decode for single requests, the aggregate for several.
        ratio: the quotient.
        spread: quotients of the two runs of each repetition, which follow each other.
        against: name of the best other side.
    """

    case: Case
    figure: str
    ratio: float
    spread: Spread
    against: str

    def to_dict(self) -> dict[str, Any]:
        """Return the ratio for JSON."""
        values = asdict(self)
        return {**values.pop("case"), **values}


@dataclass(frozen=True)
class TokenAgreement:
    """Whether another side generated the same tokens as kimi-mlx.

    Args:
        side: name of the other side.
        answers: number of compared answers, including warm-ups.
        equal: number of answers that are equal in every token.
        first_difference: smallest position of a different token; None if there is none.
    """

    side: str
    answers: int
    equal: int
    first_difference: int | None


def rows(runs: Sequence[Run], share_of: ShareOf | None = None) -> list[ResultRow]:
    """Return the statistics of each case and side, in the order of the first run, kimi-mlx first."""
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
    rates = _rates(runs)
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
        tuple(round(median(values)) for values in peaks),
        median(joules) if joules else None,
        None if share_of is None else share_of(runs[0].case, rates["decode_tok_per_s"].median),
        _encoding(runs[0].image_tokens, [answer.statistics for answer in answers]),
        ExpertFigures.of([answer.statistics for answer in answers]),
    )


def _rates(runs: Sequence[Run]) -> dict[str, Spread]:
    answers = [answer for run in runs for answer in run.answers]
    return {
        "prefill_tok_per_s": Spread.of([answer.statistics.prefill_tok_per_s for answer in answers]),
        "decode_tok_per_s": Spread.of([answer.statistics.decode_tok_per_s for answer in answers]),
        "aggregate_tok_per_s": Spread.of([run.new_tokens / run.outcome.wall_s for run in runs]),
    }


def _encoding(image_tokens: int, statistics: Sequence[Statistics]) -> Encoding | None:
    if not image_tokens:
        return None
    encode_s = [answer.encode_s for answer in statistics]
    return Encoding(
        image_tokens,
        Spread.of(encode_s),
        Spread.of([image_tokens / seconds if seconds else 0.0 for seconds in encode_s]),
        Spread.of([answer.ttft_s - answer.encode_s for answer in statistics]),
    )


def ratios(runs: Sequence[Run]) -> list[SpeedRatio]:
    """Compare kimi-mlx with the best other side in each case; empty if there is none."""
    table_rows = rows(runs)
    all_ratios: list[SpeedRatio] = []
    for ours in (row for row in table_rows if row.side == OURS):
        others = [row for row in table_rows if row.side != OURS and row.case == ours.case]
        for figure in (RATES[2:] if ours.case.concurrency > 1 else RATES[:2]) if others else ():
            best = max(others, key=lambda row, figure=figure: row.rates[figure].median)
            ratio = ours.rates[figure].median / best.rates[figure].median
            mine, theirs = (_by_repetition(runs, ours.case, side, figure) for side in (OURS, best.side))
            quotients = [mine[repetition] / theirs[repetition] for repetition in mine if repetition in theirs]
            spread = Spread.of(quotients or [ratio])
            all_ratios.append(SpeedRatio(ours.case, figure, ratio, spread, best.side))
    return all_ratios


def _by_repetition(runs: Sequence[Run], case: Case, side: str, figure: str) -> dict[int, float]:
    """Return a rate of each counted repetition, the median of its requests."""
    counted = [run for run in runs if (run.case, run.side) == (case, side) and not run.is_warmup]
    return {run.repetition: _rates([run])[figure].median for run in counted}


def agreements(runs: Sequence[Run]) -> list[TokenAgreement]:
    """Compare the tokens of every other side with those of kimi-mlx."""
    ours = {(run.case, run.repetition): run.answers for run in runs if run.side == OURS}
    results: list[TokenAgreement] = []
    for side in dict.fromkeys(run.side for run in runs if run.side != OURS):
        pairs = [
            (mine.ids, other.ids)
            for run in runs
            if run.side == side and (run.case, run.repetition) in ours
            for mine, other in zip(ours[run.case, run.repetition], run.answers, strict=True)
        ]
        positions = [position for pair in pairs if (position := _first_difference(*pair)) is not None]
        if pairs:
            results.append(TokenAgreement(side, len(pairs), len(pairs) - len(positions), min(positions, default=None)))
    return results


def _first_difference(one: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    if one == other:
        return None
    shared = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(shared) if a != b), min(len(one), len(other)))


def notes(runs: Sequence[Run], sides: Sequence[Side]) -> list[str]:
    """Return notes on the results: drafts, requests that did not run as a batch, prefixes that were not cached."""
    lines = _draft_notes([answer.statistics for run in runs if not run.is_warmup for answer in run.answers])
    if any(run.case.concurrency > 1 for run in runs):
        lines += [
            f"{side.name}: concurrent requests did not run as a batch: {side.not_batched_because}"
            for side in sides
            if side.not_batched_because
        ]
    for side in sides:
        uncached = [
            run.case.depth - answer.statistics.cached_tokens
            for run in runs
            if run.side == side.name
            for answer in run.answers
        ]
        if max(uncached, default=0) > 0:
            lines.append(f"{side.name}: up to {max(uncached)} tokens of the depth were not cached but timed")
    return lines


def _draft_notes(statistics: Sequence[Statistics]) -> list[str]:
    """Return the number of accepted draft tokens, and why drafts were off at the end; empty without drafts."""
    drafted = sum(answer.drafted_tokens for answer in statistics)
    reasons = [answer.drafts_off for answer in statistics if answer.drafts_off is not None]
    facts: list[str] = []
    if drafted:
        accepted = sum(answer.accepted_tokens for answer in statistics)
        facts.append(f"{accepted:,} of {drafted:,} draft tokens accepted")
    if reasons:
        facts.append(f"drafts off at the end of {len(reasons)} of {len(statistics)} answers: {reasons[-1]}")
    return [f"{OURS}: {'; '.join(facts)}"] if facts else []
