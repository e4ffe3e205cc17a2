"""Streamed experts on real rings: every strategy generates the tokens of one process that has all experts in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.parallel.placement import STRATEGIES
from kimi_mlx.store.download import StoreOptions, build, open_build_job
from tests.divisible import CONFIGS, write_divisible
from tests.fakes import KIMI_MINI
from tests.ranks.placement_rank import Answers, answer
from tests.ranks.test_placements import WEIGHTS, case, check

pytestmark = pytest.mark.ranks

NONE, SOME, MOST = 0, 600_000, 1_500_000
"""Memory for experts on each rank: the staging area alone; a few slots; most experts, all of small shares."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the checkpoints by name."""
    root = tmp_path_factory.mktemp("divisible")
    return {"mini": KIMI_MINI} | {name: write_divisible(root, name, layers=5) for name in CONFIGS}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Callable[[str], Answers]:
    """Return a function from the name of a checkpoint to the answers of one process with all experts in memory."""
    answers: dict[str, Answers] = {}

    def answer_of(name: str) -> Answers:
        if name not in answers:
            answers[name] = answer(case(folders[name], "hybrid"), None)
        return answers[name]

    return answer_of


def streamed_case(
    folder: Path, strategy: str, size: int, memory: int, root: Path, speculate: int = 0
) -> dict[str, Any]:
    """Build a store and return a case that reads experts from it."""
    job = open_build_job(StoreOptions(folder, root / "stores", size, strategy), SingleGroup())
    build(StoreOptions(folder, root / "stores", size, strategy), job, SingleGroup())
    return case(job.folder, strategy, speculate) | {"expert_memory": memory}


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
