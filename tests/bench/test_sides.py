"""Both sides on a tiny checkpoint, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.bench.measure import BenchmarkPlan, Case, make_batch
from kimi_mlx.bench.mlx_lm_side import MODES, MlxLmSide, open_mlx_lm
from kimi_mlx.bench.sides import RequestBatch, SessionSide, Side, TimedAnswer
from kimi_mlx.bench.slow_link import slow_links
from kimi_mlx.cluster.channel.messages import encode
from kimi_mlx.cluster.hosts.host import local_cluster
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.errors import KimiMlxError, WeightsError
from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import SessionOptions
from tests.bench.tiny import write_tiny

PLAN = BenchmarkPlan((24,), 6)
SINGLE = make_batch(Case(0, 24, 1), 0, PLAN, 512)
DEEP = make_batch(Case(16, 24, 3), 0, PLAN, 512)


@contextmanager
def open_kimi_mlx(options: SessionOptions) -> Iterator[SessionSide]:
    """Load kimi-mlx in this process or on a ring."""
    with closing(open_session(options)) as session:
        yield SessionSide("kimi-mlx", session)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable compilation in mlx-lm, which takes longer than everything else."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bench") / "tiny")


def kimi_mlx_answers(folder: Path, batch: RequestBatch) -> list[tuple[int, ...]]:
    with open_kimi_mlx(SessionOptions(folder)) as side:
        return ids_of(side.run(batch).answers)


def ids_of(answers: Sequence[TimedAnswer]) -> list[tuple[int, ...]]:
    return [answer.ids for answer in answers]


def has_ended(pid: int, timeout_s: float = 10) -> bool:
    """Whether a process has exited, possibly as a zombie."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):
            return True
        time.sleep(0.1)
    return False


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_side_starts_each_batch_with_an_empty_cache(tiny: Path) -> None:
    with open_kimi_mlx(SessionOptions(tiny)) as side:
        first, second = side.run(SINGLE), side.run(SINGLE)
    assert ids_of(first.answers) == ids_of(second.answers)
    assert len(first.answers[0].ids) == 6
    assert second.answers[0].statistics.cached_tokens == 0
    assert second.peak_memory_bytes[0] > 0


def test_the_depth_is_cached_and_every_token_has_a_time(tiny: Path) -> None:
    with open_kimi_mlx(SessionOptions(tiny)) as side:
        outcome = side.run(DEEP)
        separate = [side.run(RequestBatch((request,))) for request in DEEP.requests]
    assert [answer.statistics.cached_tokens for answer in outcome.answers] == [16, 16, 16]
    assert ids_of(outcome.answers) == [result.answers[0].ids for result in separate]
    for answer in outcome.answers:
        assert len(answer.arrivals_s) == 6
        assert list(answer.arrivals_s) == sorted(answer.arrivals_s)
        assert 0 < answer.arrivals_s[-1] <= outcome.wall_s


def test_the_prefix_is_kept_from_batch_to_batch(tiny: Path) -> None:
    """mlx-lm's side is compared with it below."""
    shorter, later = make_batch(Case(16, 9, 1), 1, PLAN, 512), make_batch(Case(16, 24, 3), 1, PLAN, 512)
    assert shorter.prefix == later.prefix == DEEP.prefix
    with open_kimi_mlx(SessionOptions(tiny)) as side:
        outcomes = [side.run(batch) for batch in (DEEP, shorter, later, SINGLE, later)]
    assert ids_of(outcomes[2].answers) == ids_of(outcomes[4].answers)
    assert [outcome.answers[0].statistics.cached_tokens for outcome in outcomes] == [16, 16, 16, 0, 16]


@pytest.mark.slow
@pytest.mark.ranks
def test_kimi_mlx_on_ranks_caches_the_depth_and_reports_memory_per_rank(tiny: Path) -> None:
    with open_kimi_mlx(SessionOptions(tiny, ranks=2)) as side:
        outcome = side.run(DEEP)
    assert ids_of(outcome.answers) == kimi_mlx_answers(tiny, DEEP)
    assert [answer.statistics.cached_tokens for answer in outcome.answers] == [16, 16, 16]
    assert len(outcome.peak_memory_bytes) == 2
    assert all(outcome.peak_memory_bytes)


@pytest.mark.sweep
@pytest.mark.ranks
def test_both_sides_use_the_slow_link(tiny: Path) -> None:
    """A token needs one collective per layer with hybrid, and two in mlx-lm's tensor mode."""
    with slow_links(20) as hostfile_rewriter:
        options = SessionOptions(tiny, ranks=2, cluster=replace(local_cluster(2), hostfile_rewriter=hostfile_rewriter))
        with open_kimi_mlx(options) as side:
            assert step_s(side) >= 3 * 0.02
        with open_mlx_lm(options, "tensor") as side:
            assert step_s(side) >= 6 * 0.02


def step_s(side: Side) -> float:
    """Return the seconds per token after the first."""
    (answer,) = side.run(SINGLE).answers
    return 1 / answer.statistics.decode_tok_per_s


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.sweep)])
def test_mlx_lm_generates_the_same_tokens_and_is_idle_between_batches(tiny: Path, ranks: int) -> None:
    expected, expected_deep = kimi_mlx_answers(tiny, SINGLE), kimi_mlx_answers(tiny, DEEP)
    for mode in MODES["mlx-lm"] if ranks > 1 else ("single",):
        with open_mlx_lm(SessionOptions(tiny, ranks), mode) as side:
            first, deep = side.run(DEEP), side.run(DEEP)  # the second with the prefix that was kept
            assert ids_of(first.answers) == ids_of(deep.answers) == expected_deep
            assert [answer.statistics.cached_tokens for answer in deep.answers] == [16, 16, 16]
            assert (side.not_batched_because is None) == (ranks == 1)
            outcome = side.run(SINGLE)
            (answer,) = outcome.answers
            assert ids_of(outcome.answers) == expected
            assert answer.statistics.prompt_tokens == 24
            assert answer.statistics.generated_tokens == len(answer.arrivals_s) == 6
            assert answer.statistics.decode_tok_per_s > 0
            assert len(outcome.peak_memory_bytes) == ranks
            pids = side.pids
            assert len(pids) == ranks
            if Path("/proc").is_dir():
                before = sum(map(cpu_seconds, pids))
                time.sleep(0.5)
                assert sum(map(cpu_seconds, pids)) - before < 0.2
        assert all(has_ended(pid) for pid in pids)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_model_that_mlx_lm_cannot_load_is_named(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    (folder / "model-00002-of-00004.safetensors").unlink()
    with (
        pytest.raises(WeightsError, match=r"mlx-lm cannot load `.*tiny` \(single\): ValueError"),
        open_mlx_lm(SessionOptions(folder), "single"),
    ):
        pytest.fail("it was loaded")


@pytest.mark.slow
@pytest.mark.ranks
def test_a_lost_process_of_mlx_lm_ends_the_side(tiny: Path) -> None:
    with open_mlx_lm(SessionOptions(tiny), "single") as side:
        os.kill(side.pids[0], signal.SIGKILL)
        with pytest.raises(KimiMlxError, match=r"mlx-lm: rank 0 of 1 .* SIGKILL"):
            side.run(SINGLE)


@pytest.mark.slow
@pytest.mark.ranks
def test_mlx_lm_ends_with_its_input(tiny: Path) -> None:
    """The process exits when its input is closed, as after a kill of the front."""
    ring = Ring(local_cluster(1), module="kimi_mlx.bench.mlx_lm_rank")
    try:
        ring.start(folder=str(tiny), dtype=None, mode="single")
        side = MlxLmSide("single", ring)
        side.wait_until_ready()
        (process,) = ring._ranks
        assert process._process.stdin is not None
        process._process.stdin.write(encode("fill", prefix=SINGLE.requests[0].prompt * 20, copies=1))
        process._process.stdin.close()
        assert has_ended(process.pid)
    finally:
        ring.close()
