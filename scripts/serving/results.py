"""From runs of the serving benchmark to figures: rates, percentiles, errors, memory, ratios."""

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
    """The figures of one server; warm-ups do not count.

    Args:
        side: its name.
        requests: that were made.
        errors: how often each thing went wrong.
        prompt_tokens: of all prompts, by the server's count.
        cached_tokens: of these, those it had computed before.
        new_tokens: of all answers, by the server's count.
        requested_tokens: that these answers could have had.
        tok_per_s: all new tokens of a run over its wall time.
        requests_per_s: all requests of a run over its wall time.
        ttft_s: of each turn: from the request until the first text.
        inter_token_s: from one piece of text to the next; None where answers are no streams.
        resident_bytes: before the first run, after each tenth of the requests of each run, and at each run's end.
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
        """For JSON."""
        return asdict(self)


def serving_rows(runs: Sequence[ServingRun]) -> list[ServingRow]:
    """The figures of each side, ours first."""
    counted = [run for run in runs if run.repetition >= 0]
    sides = sorted(dict.fromkeys(run.side for run in counted), key=lambda side: side != OURS)
    return [_row([run for run in counted if run.side == side]) for side in sides]


def _row(runs: Sequence[ServingRun]) -> ServingRow:
    records = [each for run in runs for each in run.records]
    good = [each for each in records if each.error is None]
    turns = range(1 + max((each.turn for each in records), default=0))
    return ServingRow(
        runs[0].side,
        len(records),
        count_errors(records),
        sum(each.prompt_tokens for each in good),
        sum(each.cached_tokens for each in good),
        sum(each.new_tokens for each in good),
        sum(each.requested_tokens for each in good),
        Spread.of([sum(each.new_tokens for each in run.records) / run.wall_s for run in runs]),
        Spread.of([len(run.records) / run.wall_s for run in runs]),
        tuple(_percentiles([each.ttft_s for each in good if each.turn == turn]) for turn in turns),
        _percentiles([gap for each in good for gap in each.gaps_s]),
        tuple(each for run in runs for each in run.resident_bytes),
    )


def count_errors(records: Sequence[RequestRecord]) -> dict[str, int]:
    """How often each thing went wrong."""
    return dict(Counter(each.error for each in records if each.error is not None))


def _percentiles(times: Sequence[float]) -> Percentiles | None:
    return Percentiles.of(times) if times else None


@dataclass(frozen=True)
class ServingRatio:
    """Ours against another server in one figure: the median over repetitions of the quotient of one repetition.

    Args:
        against: the other side.
        figure: `tok_per_s`, or `ttft_s` of a turn (`ttft_s turn 2`), by its p50.
        ratio: the quotient; of rates more is better, of times less.
    """

    against: str
    figure: str
    ratio: Spread

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def serving_ratios(runs: Sequence[ServingRun]) -> list[ServingRatio]:
    """Ours against each other side, by repetitions: their runs are neighbours and share what disturbs the machine."""
    by_key = {(run.side, run.repetition): run for run in runs if run.repetition >= 0}
    found: list[ServingRatio] = []
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
            found.append(ServingRatio(side, "tok_per_s", Spread.of(rates)))
        for turn in range(min(len(row.ttft_s) for pair in pairs for row in pair)):
            times = [(ours.ttft_s[turn], other.ttft_s[turn]) for ours, other in pairs]
            quotients = [ours.p50 / other.p50 for ours, other in times if ours and other]
            if quotients:
                found.append(ServingRatio(side, f"ttft_s turn {turn + 1}", Spread.of(quotients)))
    return found


@dataclass(frozen=True)
class TextAgreement:
    """How many of another server's answers were the same text as ours.

    Args:
        side: the other side.
        answers: how many were compared: those to the same words, warm-ups included.
        equal: how many were the same.
    """

    side: str
    answers: int
    equal: int


def same_texts(runs: Sequence[ServingRun]) -> list[TextAgreement]:
    """Compare first turns: later ones repeat the server's own words, and so have other prompts once texts differ."""
    texts = {run.side: {} for run in runs}
    for run in runs:
        first = [each for each in run.records if each.turn == 0 and each.error is None]
        texts[run.side] |= {(run.repetition, each.conversation): each.text for each in first}
    ours = texts.get(OURS, {})
    found: list[TextAgreement] = []
    for side, theirs in texts.items():
        shared = ours.keys() & theirs.keys()
        if side != OURS and shared:
            found.append(TextAgreement(side, len(shared), sum(ours[key] == theirs[key] for key in shared)))
    return found


def memory_growth_bytes(row: ServingRow) -> int | None:
    """What the memory grew by in the second half of the requests: caches have filled up in the first."""
    seen = row.resident_bytes
    return round(median(seen[-2:]) - median(seen[len(seen) // 2 :][:2])) if len(seen) >= 4 else None
