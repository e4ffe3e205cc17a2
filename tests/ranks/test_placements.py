"""The proof of the placements: on real rings every strategy, even and uneven, gives the text of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.parallel.placement import STRATEGIES
from kimi_mlx.runtime.download import StoreOptions, build, open_job
from tests.divisible import make_prompt, write_divisible
from tests.mlx_launch import loopback_hostfile, ring_variables
from tests.ranks.placement_rank import Answers, answer

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parent.parent.parent
RING_S = 500

WEIGHTS = {2: (3, 1), 3: (1, 3, 2), 4: (2, 1, 1, 3)}

GREEDY = Request(make_prompt(40, 1), max_tokens=10)
"""Three prefill steps, then decode."""

SAMPLED = Request(make_prompt(21, 2), max_tokens=8, sampling=Sampling(temperature=0.9, top_p=0.9, seed=11))

OTHERS = [
    SAMPLED,
    Request(make_prompt(1, 3), max_tokens=1),
    Request(make_prompt(5, 4), max_tokens=14),
    Request(make_prompt(33, 5), max_tokens=6),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the names of CONFIGS."""
    root = tmp_path_factory.mktemp("divisible")
    return {name: write_divisible(root, name, layers=5) for name in ("k2", "moonlight", "unfused")}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, Answers]:
    """What one process answers, for each checkpoint."""
    found = {name: answer(case(folder, "hybrid"), None) for name, folder in folders.items()}
    greedy = found["k2"]["alone 0"]
    assert len(set(greedy)) > len(greedy) // 2  # a text that says something
    return found


def case(folder: Path, strategy: str, requests: Sequence[Request] = (GREEDY, *OTHERS)) -> dict[str, Any]:
    return {"folder": str(folder), "strategy": strategy, "requests": [request.to_dict() for request in requests]}


def run_ring(size: int, cases: Sequence[dict[str, Any]], folder: Path) -> list[list[Answers]]:
    """The answers of each rank to each case; one ring for all."""
    hostfile = folder / "hostfile.json"
    hostfile.write_text(loopback_hostfile(size))
    command = [sys.executable, "-m", "tests.ranks.placement_rank", str(size)]
    environment = {"PYTHONPATH": f"{ROOT}", "PATH": "/usr/bin:/bin"}
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
        for each in ranks:
            assert each.stdin is not None
            each.stdin.write(json.dumps(cases))
            each.stdin.close()
            each.stdin = None
        said = [each.communicate(timeout=RING_S) for each in ranks]
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    assert [each.returncode for each in ranks] == [0] * size, [stderr for _, stderr in said]
    return [[json.loads(line) for line in stdout.splitlines()] for stdout, _ in said]


def strategies(size: int) -> list[str]:
    weights = ":".join(map(str, WEIGHTS[size]))
    return [*STRATEGIES, *(f"{name}:{weights}" for name in STRATEGIES)]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_every_placement_gives_the_text_of_one_process(
    size: int, folders: dict[str, Path], expected: dict[str, Answers], tmp_path: Path
) -> None:
    names = [("k2", strategy) for strategy in strategies(size)]
    names += [(name, strategy) for name in ("moonlight", "unfused") for strategy in strategies(size)[4:]]
    cases = [case(folders[name], strategy) for name, strategy in names]
    said = run_ring(size, cases, tmp_path)
    for number, (name, strategy) in enumerate(names):
        assert said[0][number] == expected[name], (name, strategy)
        if not strategy.startswith("pipeline"):
            assert all(answers[number] == said[0][number] for answers in said), (name, strategy)
