"""The streaming benchmark: its router, its files, its sides, its figures."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from kimi_mlx.errors import UsageError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.expert_use import ExpertUse
from kimi_mlx.units import GB, MB
from scripts.streaming import memory_group as groups
from scripts.streaming.files import StreamingFiles, make_files, streaming_config
from scripts.streaming.least_recent import LeastRecentlyUsed
from scripts.streaming.measure import SIDES, Memory, StreamingRun
from scripts.streaming.memory_group import memory_group
from scripts.streaming.report import Bound, streaming_rows, streaming_table, streaming_to_dict, targets
from scripts.streaming.worker import WorkerOptions, WorkerResult, open_side, stepper
from scripts.streaming.zipf import MAX_SHARE, popularity, zipf_bias
from tests.bench.tiny import TINY


@pytest.mark.parametrize(("num_experts", "exponent"), [(256, 0.8), (64, 1.2), (16, 0.0)])
def test_the_router_chooses_as_zipfs_law_says(num_experts: int, exponent: float) -> None:
    bias = zipf_bias(num_experts, 8, exponent)
    logits = np.random.default_rng(1).standard_normal((4000, num_experts))
    chosen = np.argpartition(-(1 / (1 + np.exp(-logits)) + bias), 7, axis=-1)[:, :8]
    shares = np.bincount(chosen.reshape(-1), minlength=num_experts) / len(logits)
    expected = popularity(num_experts, 8, exponent)
    assert expected.sum() == pytest.approx(8)
    assert expected.max() <= MAX_SHARE
    assert (np.diff(expected) <= 0).all()
    assert np.abs(shares - expected).max() < 0.06
    popular = num_experts // 5
    assert shares[:popular].sum() == pytest.approx(expected[:popular].sum(), rel=0.05)


def test_the_checkpoint_has_the_requested_size() -> None:
    for bits in (4, 32):
        config = streaming_config(4, bits)
        values = 3 * config["hidden_size"] * config["moe_intermediate_size"] * config["n_routed_experts"] * 4
        assert values * (0.625 if bits == 4 else 4) == pytest.approx(4 * GB, rel=0.02)


def test_lru_replaces_the_least_recently_used_expert() -> None:
    use = ExpertUse([1], [4], 2)
    use.observe(0, np.array([3]), np.array([9]), 9)
    policy = LeastRecentlyUsed(use, 2)
    assert policy.scores(0).argmax() == 3  # what was learned earlier
    for expert in (0, 1, 2, 0):
        policy.observe(0, np.array([expert]), np.array([1]), 1)
    assert np.argsort(policy.scores(0)).tolist() == [3, 1, 2, 0]
    assert (policy.scores(0) < policy.repeat_chance / 2).all()


@pytest.fixture(scope="module", params=[4, pytest.param(32, marks=pytest.mark.slow)])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StreamingFiles:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("streaming")))
        config = streaming_config(0.001, **TINY)
        made = make_files(config, request.param)
        assert make_files(config, request.param) == made  # once
    return made


def open_tiny(files: StreamingFiles, side: Any) -> Model:
    experts = files.manifest.files[1].experts
    assert experts is not None
    expert_memory = 8 * experts.record.record_bytes  # half of the experts
    options = WorkerOptions(side, str(files.folder), str(files.use), expert_memory, 0, 0, 0)
    return open_side(options, load_config(files.folder))


@pytest.mark.slow
@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="the memory map is for MLX's CPU backend")
def test_all_sides_compute_the_same(tiny: StreamingFiles) -> None:
    learner = open_tiny(tiny, "learn")
    expected: list[np.ndarray] = []
    for side in ("learn", *SIDES):
        model = learner if side == "learn" else open_tiny(tiny, side)
        step = stepper(model)
        logits = [np.array(step(token)) for token in range(0, 500, 30)]
        if side == "learn":
            assert model.streamer is not None
            tiny.use.write_bytes(model.streamer.use.to_bytes())
            expected = logits
        assert all((one == other).all() for one, other in zip(logits, expected, strict=True)), side
        counts = model.expert_stats
        assert (counts is None) == (side in ("memory map", "resident"))
        if counts is not None:
            assert counts.misses > 0
            begun = counts.misses + counts.guesses - counts.guesses_right - counts.guesses_cancelled
            assert counts.bytes_read == begun * counts.expert_bytes
        model.close()


def test_too_little_memory_is_refused(tiny: StreamingFiles) -> None:
    with pytest.raises(UsageError, match="for experts, not"):
        Memory.of(tiny, 1 / 3)


@pytest.mark.skipif(not os.access(groups.ROOT / "memory", os.W_OK), reason="needs control groups and root")
def test_a_group_limits_memory_and_goes_away() -> None:
    with memory_group(64 * MB) as group:
        assert group is not None
        assert group.folder.is_dir()
        assert group.command(["true"])[-1] == "true"
        assert group.peak_bytes == 0
    assert not group.folder.exists()


def test_without_control_groups_nothing_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "ROOT", tmp_path)
    with memory_group(64 * MB) as group:
        assert group is None
    assert not list(tmp_path.iterdir())


MEMORY = Memory(1000 * MB, 100 * MB)


def make_run(side: Any, repetition: int, rate: float, **changes: Any) -> StreamingRun:
    """Return a run of 10 tokens at a rate, of 30 hits and 10 misses."""
    has_counts = side in ("kimi-mlx", "plain LRU")
    counts: dict[str, Any] = {
        "hits": 30,
        "misses": 10,
        "bytes_read": 13 * MB,
        "wait_seconds": 0.5,
        "guesses": 8,
        "guesses_right": 4,
        "guesses_cancelled": 1,
        "expert_bytes": MB,
    }
    result = WorkerResult(
        seconds=[1 / rate] * 10,
        cpu_seconds=0.5,
        stats=counts if has_counts else None,
        disk_bytes=13 * MB,
        before_bytes=50 * MB,
        peak_bytes=700 * MB,
        logits="ab",
        disk_bytes_per_s=1e8,
    )
    return StreamingRun(side, repetition, replace(result, **changes), True, 900 * MB, "dropped", 1.0)


def make_runs(rate: float, **changes: Any) -> list[StreamingRun]:
    rates = {"disk": 1.0, "kimi-mlx": rate, "plain LRU": 8.0, "memory map": 5.0, "resident": 20.0}
    return [make_run(side, i, speed, **changes) for i in range(2) for side, speed in rates.items()]


def test_the_report_has_figures_and_targets(tiny: StreamingFiles) -> None:
    runs = make_runs(10.0)
    rows = streaming_rows(runs)
    assert [row.side for row in rows] == list(SIDES)
    ours = rows[0]
    assert (ours.hit_rate, ours.guesses_right, ours.peak_bytes) == (0.75, 0.5, 650 * MB)
    assert ours.waited == pytest.approx(0.5)
    bound = Bound.of(runs, rows)
    assert bound.read_s == pytest.approx(0.01)
    assert bound.tok_per_s == pytest.approx(20)
    met = [target.is_met for target in targets(runs, rows, MEMORY, bound)]
    assert met == [True, True, True, True, False, True]  # half of the bound
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(streaming_table(rows))
    assert "10.00 (10.00-10.00)" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    document = json.loads(json.dumps(streaming_to_dict(tiny, MEMORY, runs, {}), allow_nan=False))
    assert len(document["runs"]) == len(runs)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        (lambda: make_runs(10.0, peak_bytes=1900 * MB), [0, 4]),
        (lambda: make_runs(18.0, stats={**asdict_of_counts(), "bytes_read": 1}), [1]),
        (lambda: make_runs(7.0), [2, 3, 4]),
        (lambda: [*make_runs(18.0), make_run("kimi-mlx", 0, 18.0, logits="cd")], [5]),
    ],
)
def test_a_missed_target_is_named(change: Callable[[], list[StreamingRun]], missed: list[int]) -> None:
    runs = change()
    rows = streaming_rows(runs)
    checked = targets(runs, rows, MEMORY, Bound.of(runs, rows))
    assert [index for index, target in enumerate(checked) if not target.is_met] == missed


def asdict_of_counts() -> dict[str, Any]:
    """Return the counters of make_run."""
    counts = asdict(make_run("kimi-mlx", 0, 1.0))["result"]["stats"]
    assert counts is not None
    return counts
