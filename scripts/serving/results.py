"""Statistics of the serving benchmark: rates, percentiles, errors, memory, ratios."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from kimi_mlx.bench.machine import OURS
from kimi_mlx.bench.results import Percentiles, Spread
from scripts.serving.client import RequestRecord
from scripts.serving.load import ServingRun


@dataclass(frozen=True)
class ServingRow:
    """Statistics of one server, without warm-ups.

    Args:
        side: name of the server.
        requests: number of requests.
        errors: number of occurrences of each error.
        prompt_tokens: number of prompt tokens, as counted by the server.
        cached_tokens: number of these that were cached.
        new_tokens: number of new tokens, as counted by the server.
        requested_tokens: largest possible number of new tokens of these answers.
        tok_per_s: new tokens of a run over its wall time.
        requests_per_s: requests of a run over its wall time.
        ttft_s: time to first token, for each turn.
        inter_token_s: time between chunks of text; None without streams.
        resident_bytes: memory before the first run, after each tenth of the requests of each run, and at its end.
    """

    side: str
    requests: int
    errors: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    requested_tokens: int
    tok_per_s: Spread
    requests_per_s: Spread
    ttft_s: tuple[Percentiles | None, ...]
    inter_token_s: Percentiles | None
    resident_bytes: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return asdict(self)


def serving_rows(runs: Sequence[ServingRun]) -> list[ServingRow]:
    """Return the statistics of each server, kimi-mlx first."""
    counted = [run for run in runs if run.repetition >= 0]
    sides = sorted(dict.fromkeys(run.side for run in counted), key=lambda side: side != OURS)
    return [_row([run for run in counted if run.side == side]) for side in sides]


def _row(runs: Sequence[ServingRun]) -> ServingRow:
    records = [record for run in runs for record in run.records]
    good = [record for record in records if record.error is None]
    turns = range(1 + max((record.turn for record in records), default=0))
    return ServingRow(
        runs[0].side,
        len(records),
        count_errors(records),
        sum(record.prompt_tokens for record in good),
        sum(record.cached_tokens for record in good),
        sum(record.new_tokens for record in good),
        sum(record.requested_tokens for record in good),
        Spread.of([sum(record.new_tokens for record in run.records) / run.wall_s for run in runs]),
        Spread.of([len(run.records) / run.wall_s for run in runs]),
        tuple(_percentiles([record.ttft_s for record in good if record.turn == turn]) for turn in turns),
        _percentiles([gap for record in good for gap in record.gaps_s]),
        tuple(size for run in runs for size in run.resident_bytes),
    )


def count_errors(records: Sequence[RequestRecord]) -> dict[str, int]:
    """Count the occurrences of each error."""
    return dict(Counter(record.error for record in records if record.error is not None))


def _percentiles(times: Sequence[float]) -> Percentiles | None:
    return Percentiles.of(times) if times else None


@dataclass(frozen=True)
class ServingRatio:
    """kimi-mlx relative to another server: spread of the quotients of all repetitions.

    Args:
        against: name of the other server.
        figure: `tok_per_s`, or a percentile of `ttft_s` of a turn (`p90 ttft_s turn 2`).
        ratio: the quotient; higher is better for rates, lower for times.
    """

    against: str
    figure: str
    ratio: Spread

    def to_dict(self) -> dict[str, Any]:
        """Return the ratio for JSON."""
        return asdict(self)


def serving_ratios(runs: Sequence[ServingRun]) -> list[ServingRatio]:
    """Compare with each other server, repetition by repetition, because adjacent runs share interference."""
    by_key = {(run.side, run.repetition): run for run in runs if run.repetition >= 0}
    results: list[ServingRatio] = []
    for side in dict.fromkeys(run.side for run in runs if run.side != OURS):
        pairs = [
            (_row([run]), _row([by_key[side, run.repetition]]))
            for run in by_key.values()
            if run.side == OURS and (side, run.repetition) in by_key
        ]
        if not pairs:
            continue
        rates = [ours.tok_per_s.median / other.tok_per_s.median for ours, other in pairs if other.new_tokens]
        if rates:
            results.append(ServingRatio(side, "tok_per_s", Spread.of(rates)))
        for turn in range(min(len(row.ttft_s) for pair in pairs for row in pair)):
            times = [(ours.ttft_s[turn], other.ttft_s[turn]) for ours, other in pairs]
            for name in ("p50", "p90"):
                quotients = [getattr(ours, name) / getattr(other, name) for ours, other in times if ours and other]
                if quotients:
                    results.append(ServingRatio(side, f"{name} ttft_s turn {turn + 1}", Spread.of(quotients)))
    return results


@dataclass(frozen=True)
class TextAgreement:
    """Number of answers of another server with the same text.

    Args:
        side: name of the other server.
        answers: number of compared answers to the same messages, including warm-ups.
        equal: number of equal answers.
    """

    side: str
    answers: int
    equal: int


def same_texts(runs: Sequence[ServingRun]) -> list[TextAgreement]:
    """Compare first turns only: later prompts repeat earlier answers, and differ once those differ."""
    texts = {run.side: {} for run in runs}
    for run in runs:
        first = [record for record in run.records if record.turn == 0 and record.error is None]
        texts[run.side] |= {(run.repetition, record.conversation): record.text for record in first}
    ours = texts.get(OURS, {})
    results: list[TextAgreement] = []
    for side, theirs in texts.items():
        shared = ours.keys() & theirs.keys()
        if side != OURS and shared:
            results.append(TextAgreement(side, len(shared), sum(ours[key] == theirs[key] for key in shared)))
    return results


def memory_growth_bytes(row: ServingRow) -> int | None:
    """Return the growth of the memory in the second half of the requests; caches fill up in the first."""
    sizes = row.resident_bytes
    return round(median(sizes[-2:]) - median(sizes[len(sizes) // 2 :][:2])) if len(sizes) >= 4 else None
