"""Streamed experts on real rings: every strategy generates the tokens of one process that has all experts in memory."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.engine.events import Interrupted, Resumed, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.parallel.placement import STRATEGIES
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.sizing.expert_memory import ExpertMemory
from kimi_mlx.store.download import StoreOptions, build, open_build_job
from tests.divisible import CONFIGS, make_prompt
from tests.ranks.kill_count import KILL
from tests.ranks.placement_rank import Answers, answer
from tests.ranks.test_placements import WEIGHTS, case, check
from tests.ranks.test_ring import events_with_action, tokens_of

pytestmark = pytest.mark.ranks

NONE, SOME, MOST = 0, 600_000, 1_500_000
"""Memory for experts on each rank: the staging area alone; a few slots; most experts, all of small shares."""


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Callable[[str], Answers]:
    """Return a function from the name of a checkpoint to the answers of one process with all experts in memory."""
    answers: dict[str, Answers] = {}

    def answer_of(name: str) -> Answers:
        if name not in answers:
            answers[name] = answer(case(folders[name], "hybrid"), None)
        return answers[name]

    return answer_of


@pytest.fixture(scope="module")
def store(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of two ranks, split by experts."""
    return build_store(folders["k2"], "expert", 2, tmp_path_factory.mktemp("stores"))


def build_store(folder: Path, strategy: str, size: int, root: Path) -> Path:
    """Build the stores of all ranks; return their folder."""
    options = StoreOptions(folder, root / "stores", size, strategy)
    job = open_build_job(options, SingleGroup())
    build(options, job, SingleGroup())
    return job.folder


def streamed_case(
    folder: Path, strategy: str, size: int, memory: int, root: Path, speculate: int = 0
) -> dict[str, Any]:
    """Build a store and return a case that reads experts from it."""
    return case(build_store(folder, strategy, size, root), strategy, speculate) | {"expert_memory": memory}


@pytest.mark.slow
def test_uneven_shares(folders: dict[str, Path], expected: Callable[[str], Answers], tmp_path: Path) -> None:
    strategies = [f"{name}:{WEIGHTS[2]}" for name in STRATEGIES]
    cases = [("k2", streamed_case(folders["k2"], strategy, 2, SOME, tmp_path)) for strategy in strategies]
    check(2, cases, expected, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("memory", [NONE, SOME, MOST])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_placement(
    name: str, size: int, memory: int, folders: dict[str, Path], expected: Callable[[str], Answers], tmp_path: Path
) -> None:
    strategies = [*STRATEGIES, *(f"{each}:{WEIGHTS[size]}" for each in STRATEGIES)]
    cases = [(name, streamed_case(folders[name], strategy, size, memory, tmp_path)) for strategy in strategies]
    check(size, cases, expected, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("memory", [NONE, 150_000])
def test_drafts(memory: int, folders: dict[str, Path], expected: Callable[[str], Answers], tmp_path: Path) -> None:
    answers = {"answers": [[id for id in answer if id >= 0] for answer in expected("mini")]}
    cases = [
        ("mini", streamed_case(folders["mini"], strategy, 2, memory, tmp_path, speculate=4) | answers)
        for strategy in ("hybrid", "pipeline", "tensor")
    ]
    check(2, cases, expected, tmp_path)


STREAMED = ExpertMemory.parse("30%")


@pytest.mark.slow
def test_an_answer_resumes_after_a_rank_is_killed(
    folders: dict[str, Path], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_mlx.session.restart_policy.RESTART_DELAYS_S", (0.1,))
    request = Request(make_prompt(40, 1), max_tokens=30)
    with closing(LocalSession(SessionOptions(folders["k2"]))) as alone:
        expected = tokens_of(alone, request)
    options = SessionOptions(store, ranks=2, strategy="expert", expert_memory=STREAMED)
    with closing(RingSession(options)) as ring:
        events = events_with_action(ring, request, 10, lambda: KILL(ring.pids[1], signal.SIGKILL))
        assert [event.id for event in events if isinstance(event, Token)] == expected
        assert sum(isinstance(event, Interrupted) for event in events) == 1
        assert sum(isinstance(event, Resumed) for event in events) == 1
        assert tokens_of(ring, request) == expected
    assert all((store / f"rank-{rank}" / "expert_use.npz").is_file() for rank in range(2))


@pytest.fixture
def reading_ring(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[SessionOptions, Path]:
    """Return options of a ring that reads every expert and restarts at once, and a file of rank 1 with experts."""
    monkeypatch.setattr("kimi_mlx.session.restart_policy.RESTART_DELAYS_S", (0.1,))
    store = build_store(folders["k2"], "hybrid", 2, tmp_path)
    (path,) = (store / "rank-1").glob("layer-003*.safetensors")
    return SessionOptions(store, ranks=2, expert_memory=ExpertMemory.parse("0%")), path


@pytest.mark.sweep
def test_a_truncated_file_is_an_error_that_names_it(reading_ring: tuple[SessionOptions, Path]) -> None:
    """The file changes while the ranks run, so that only the read of an expert notices it."""
    options, path = reading_ring
    with closing(RingSession(options)) as ring:
        assert len(tokens_of(ring, Request(make_prompt(4, 1), max_tokens=2))) == 2
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(KimiMlxError, match=r"layer-003") as failure:
            tokens_of(ring, Request(make_prompt(60, 2), max_tokens=4))
    assert str(failure.value.hint).endswith("; then start kimi-mlx again")


@pytest.mark.slow
def test_an_answer_resumes_when_a_disk_is_back(reading_ring: tuple[SessionOptions, Path]) -> None:
    """The first restart fails because the file is still empty."""
    options, path = reading_ring
    data, request = path.read_bytes(), Request(make_prompt(60, 2), max_tokens=4)
    with closing(RingSession(options)) as ring:
        expected = tokens_of(ring, request)
        ring.reset()
        path.write_bytes(b"")
        events: list[object] = []
        for event in ring.generate(request):
            events.append(event)
            if isinstance(event, Interrupted):
                assert "expert" in event.reason
                if event.attempt == 2:
                    path.write_bytes(data)
        assert [event.id for event in events if isinstance(event, Token)] == expected
        assert sum(isinstance(event, Resumed) for event in events) == 1
