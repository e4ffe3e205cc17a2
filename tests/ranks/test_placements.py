"""Placements on real rings: every strategy, even and uneven, generates the same tokens as one process."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.parallel.placement import STRATEGIES
from kimi_mlx.store.download import StoreOptions, build, open_build_job
from tests.divisible import make_prompt
from tests.mlx_launch import loopback_hostfile, ring_variables
from tests.ranks.placement_rank import Answers, answer

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parent.parent.parent
RING_S = 500
"""Time limit for all cases of a ring. Ranks spin while they wait, and there may be more ranks than processors."""

Expected = Callable[[str], Answers]

WEIGHTS = {2: "3:1", 3: "1:3:2", 4: "2:1:1:3"}

REQUESTS = [
    Request(make_prompt(40, 1), max_tokens=10),  # three prefill steps, then decode
    # shares the rows of 32 tokens with the first one
    Request(
        (*make_prompt(40, 1)[:35], *make_prompt(5, 2)),
        max_tokens=8,
        client="other",
        sampling=Sampling(temperature=0.9, top_p=0.9, seed=11),
    ),
    Request(make_prompt(1, 3), max_tokens=1),
    Request(make_prompt(5, 4) * 2, max_tokens=14),  # the toy model repeats the prompt, so drafts are accepted
    Request(make_prompt(33, 5), max_tokens=90),  # cancelled
]

ALL = range(len(REQUESTS))
FEW = (0, len(REQUESTS) - 1)
"""Indices of requests for rings with more ranks than processors, which are slow."""


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Callable[[str], Answers]:
    """Return a cached function from the name of a checkpoint to the answers of one process."""
    answer_of = functools.cache(lambda name: answer(case(folders[name], "hybrid"), None))
    greedy = answer_of("k2")[0]
    assert len(set(greedy)) > len(greedy) // 2  # not one token repeated
    return answer_of


def case(folder: Path, strategy: str, speculate: int = 0, indices: Sequence[int] = ALL) -> dict[str, Any]:
    """Return a case for placement_rank.answer. Queries are divided in `expert`, and in `hybrid` with uneven shares."""
    requests = [REQUESTS[index].to_dict() for index in indices]
    divides_queries = strategy.startswith(("hybrid:", "expert"))
    return {
        "folder": str(folder),
        "strategy": strategy,
        "requests": requests,
        "speculate": speculate,
        "divides_queries": divides_queries,
    }


def assert_equal(actual: Answers, expected: Answers) -> None:
    """Compare answers. The last one is cancelled, so it may be some tokens longer or shorter than expected."""
    *others, cancelled = actual
    assert others == expected[:-1]
    length = len(cancelled) - 1
    assert cancelled[-1] == -2
    assert 0 < length < 90
    expected_ids = expected[-1][:-1]
    assert all(mine == theirs for mine, theirs in zip(cancelled, expected_ids, strict=False) if mine >= 0)


def run_ring(
    size: int,
    cases: Sequence[dict[str, Any]],
    folder: Path,
    module: str = "tests.ranks.placement_rank",
    **variables: str,
) -> list[list[Any]]:
    """Run all cases on one ring; return the results by rank and by case."""
    hostfile = folder / "hostfile.json"
    hostfile.write_text(loopback_hostfile(size))
    command = [sys.executable, "-m", module, str(size)]
    environment = {"PYTHONPATH": f"{ROOT}", "PATH": "/usr/bin:/bin", **variables}
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, **ring_variables(rank, str(hostfile))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(cases))
            rank.stdin.close()
            rank.stdin = None
        outputs = [rank.communicate(timeout=RING_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * size, [stderr for _, stderr in outputs]
    return [[json.loads(line) for line in stdout.splitlines()] for stdout, _ in outputs]


def check(
    size: int,
    cases: Sequence[tuple[str, dict[str, Any]]],
    expected: Expected,
    folder: Path,
    indices: Sequence[int] = ALL,
) -> None:
    """Run cases on one ring and compare the answers with those of one process.

    Args:
        size: number of ranks.
        cases: names of checkpoints, and cases.
        expected: function from the name of a checkpoint to the answers of one process.
        folder: folder for the hostfile.
        indices: indices of the requests in each case.
    """
    by_rank = run_ring(size, [fields for _, fields in cases], folder)
    for case_index, (name, fields) in enumerate(cases):
        alone, *others = expected(name)
        answers = [by_case[case_index] for by_case in by_rank]
        assert_equal(answers[0], [alone, *(others[index] for index in indices)])
        if not fields["strategy"].startswith("pipeline"):  # only rank 0 of a pipeline knows every token
            assert all(rank_answers == answers[0] for rank_answers in answers), fields["strategy"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.sweep)])
def test_with_the_fast_fence_only_sums_are_used(
    size: int, folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    cases = [case(folders["k2"], strategy, indices=FEW) for strategy in ("hybrid", "tensor")]
    by_rank = run_ring(size, cases, tmp_path, MLX_METAL_FAST_SYNCH="1")
    alone, *others = expected("k2")
    for answers in itertools.chain(*by_rank):
        assert_equal(answers, [alone, *(others[index] for index in FEW)])


SIZES = [2, *(pytest.param(size, marks=pytest.mark.sweep) for size in (3, 4))]
LONG_SIZES = [pytest.param(size, marks=pytest.mark.sweep) for size in (2, 3, 4)]


@pytest.mark.parametrize("is_even", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("size", SIZES)
def test_every_placement_generates_the_tokens_of_one_process(
    size: int, is_even: bool, folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    strategies = [name if is_even else f"{name}:{WEIGHTS[size]}" for name in STRATEGIES]
    indices = ALL if size == 2 else FEW
    cases = [("k2", case(folders["k2"], strategy, indices=indices)) for strategy in strategies]
    check(size, cases, expected, tmp_path, indices)


@pytest.mark.parametrize("size", LONG_SIZES)
def test_other_checkpoints(size: int, folders: dict[str, Path], expected: Expected, tmp_path: Path) -> None:
    strategies = [f"{name}:{WEIGHTS[size]}" for name in STRATEGIES]
    cases = [(name, case(folders[name], strategy)) for name in ("moonlight", "unfused") for strategy in strategies]
    check(size, cases, expected, tmp_path)


@pytest.mark.parametrize("size", LONG_SIZES)
def test_shard_stores(size: int, folders: dict[str, Path], expected: Expected, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = []
    for name, base in itertools.product(("k2", "unfused"), STRATEGIES):
        strategy = f"{base}:{WEIGHTS[size]}"
        options = StoreOptions(folders[name], tmp_path / "stores", size, strategy)
        job = open_build_job(options, SingleGroup())
        build(options, job, SingleGroup())
        cases.append((name, case(job.folder, strategy)))
    check(size, cases, expected, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.sweep)])
def test_drafts(size: int, folders: dict[str, Path], expected: Expected, tmp_path: Path) -> None:
    names = ("hybrid", "pipeline", "tensor") if size == 2 else STRATEGIES
    answers = {"answers": [[id for id in answer if id >= 0] for answer in expected("mini")]}
    cases = [("mini", case(folders["mini"], name, speculate=4) | answers) for name in names]
    check(size, cases, expected, tmp_path)
