"""The metrics that the engine counts."""

from __future__ import annotations

from kimi_mlx.engine.batch_sizes import BATCH_SIZE_LIMITS, NO_STEPS, BatchSizes
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.server.metrics import Metrics
from kimi_mlx.session.session import DraftStatus, SessionStatus


def test_batch_sizes_are_a_histogram() -> None:
    sizes = NO_STEPS
    for size in (0, 1, 2, 3, 100, 100, 300):
        sizes = sizes.with_step(size)
    lines = Metrics().render(SessionStatus(is_up=True, batch_sizes=sizes), is_up=True).decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("kimi_mlx_batch_size"))
    buckets = {name.split('"')[1]: float(value) for name, value in values.items() if "bucket" in name}
    assert buckets == dict.fromkeys(["4", "8", "16", "32", "64"], 3.0) | {
        "1": 1.0,
        "2": 2.0,
        "128": 5.0,
        "256": 5.0,
        "+Inf": 6.0,
    }
    assert float(values["kimi_mlx_batch_size_count"]) == 6
    assert float(values["kimi_mlx_batch_size_sum"]) == 506


def test_the_reason_why_nothing_is_drafted() -> None:
    metrics = Metrics()
    reasons = ("a step of 4 tokens takes 2.9 times as long as one of 1", "nothing to draft", None)
    for reason in reasons:
        status = SessionStatus(is_up=True, drafts=DraftStatus(off_reason=reason))
        lines = metrics.render(status, is_up=True).decode().splitlines()
        off = [line for line in lines if line.startswith("kimi_mlx_drafts_off")]
        assert off == ([] if reason is None else [f'kimi_mlx_drafts_off{{reason="{reason}"}} 1.0'])
        assert f"kimi_mlx_drafts_active {float(reason is None)}" in lines


def test_batch_sizes_by_name() -> None:
    names = BatchSizes(range(len(BATCH_SIZE_LIMITS) + 1)).to_dict()
    assert list(names) == [
        "1",
        "2",
        "3-4",
        "5-8",
        "9-16",
        "17-32",
        "33-64",
        "65-128",
        "129-256",
        "257 or more",
    ]
    assert list(names.values()) == list(range(10))


def test_counters_have_no_series_of_their_creation() -> None:
    assert b"_created" not in Metrics().render(SessionStatus(is_up=True), is_up=True)


def test_a_guess_that_is_not_decided_yet_is_counted_once() -> None:
    metrics = Metrics()
    for guesses, right in ((10, 0), (10, 5), (15, 5)):
        experts = {0: ExpertStats(guesses=guesses, guesses_right=right, num_experts=8)}
        text = metrics.render(SessionStatus(is_up=True, experts=experts), is_up=True).decode()
    assert 'kimi_mlx_expert_guesses_total{result="right"} 5.0' in text
    assert 'kimi_mlx_expert_guesses_total{result="wrong"} 10.0' in text
