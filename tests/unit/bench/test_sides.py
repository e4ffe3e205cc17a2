"""Both sides on a tiny checkpoint, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kimi_mlx.bench.mlx_lm_side import MODES, MlxLmSide, open_mlx_lm
from kimi_mlx.bench.sides import Answer, open_kimi_mlx
from kimi_mlx.bench.workloads import random_prompt
from kimi_mlx.cluster.hosts import local_cluster
from kimi_mlx.cluster.messages import encode
from kimi_mlx.cluster.ring import Ring
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import KimiMlxError, WeightsError
from kimi_mlx.runtime.session import SessionOptions
from tests.unit.bench.tiny import write_tiny

REQUEST = Request(random_prompt(512, 24, 0), max_tokens=6, sampling=Sampling(seed=0))


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare mlx-lm its C++ compiler, which takes longer than everything else."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bench") / "tiny")


def kimi_mlx_answer(folder: Path) -> Answer:
    with open_kimi_mlx(SessionOptions(folder)) as side:
        return side.run(REQUEST)


def has_ended(pid: int, patience_s: float = 10) -> bool:
    """Whether a process is gone, or a zombie that its parent has yet to collect."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):
            return True
        time.sleep(0.1)
    return False


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_side_starts_each_answer_afresh(tiny: Path) -> None:
    with open_kimi_mlx(SessionOptions(tiny)) as side:
        first, second = side.run(REQUEST), side.run(REQUEST)
    assert first.ids == second.ids
    assert len(first.ids) == 6
    assert second.statistics.cached_tokens == 0


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_mlx_lm_says_the_same_as_kimi_mlx_and_idles_in_between(tiny: Path, ranks: int) -> None:
    expected = kimi_mlx_answer(tiny)
    for mode in MODES[ranks > 1]:
        with open_mlx_lm(SessionOptions(tiny, ranks), mode) as side:
            answer = side.run(REQUEST)
            assert answer.ids == expected.ids
            assert answer.statistics.prompt_tokens == 24
            assert answer.statistics.generated_tokens == 6
            assert answer.statistics.decode_tok_per_s > 0
            pids = side.pids
            assert len(pids) == ranks
            if Path("/proc").is_dir():
                before = sum(map(processor_seconds, pids))
                time.sleep(0.5)
                assert sum(map(processor_seconds, pids)) - before < 0.2
        assert all(has_ended(pid) for pid in pids)


@pytest.mark.slow
@pytest.mark.ranks
def test_what_mlx_lm_cannot_load_is_named(tmp_path: Path) -> None:
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
            side.run(REQUEST)


@pytest.mark.slow
@pytest.mark.ranks
def test_mlx_lm_ends_with_its_input(tiny: Path) -> None:
    """What happens when the front is killed: nothing is sent, the pipe just closes."""
    ring = Ring(local_cluster(1), module="kimi_mlx.bench.mlx_lm_rank")
    try:
        ring.start(folder=str(tiny), dtype=None, mode="single")
        side = MlxLmSide("single", ring)
        side.wait_until_ready()
        (process,) = ring._ranks
        assert process._process.stdin is not None
        process._process.stdin.write(encode("request", number=1, request=REQUEST.to_dict()))
        process._process.stdin.close()
        assert has_ended(process.pid)
    finally:
        ring.close()
