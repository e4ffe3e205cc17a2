"""The prompt cache on disk of real rings: the next ring reuses the blocks that all of its ranks have."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.divisible import make_prompt
from tests.fakes import KIMI_MINI
from tests.mlx_launch import loopback_hostfile, ring_variables

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
RING_S = 120


def run_ring(case: dict[str, Any], folder: Path) -> list[tuple[list[int], int]]:
    """Return, by rank, the ids of the answer that it knows, and the number of cached prompt tokens."""
    hostfile = folder / "hosts.json"
    hostfile.write_text(loopback_hostfile(case["ranks"]))
    command = [sys.executable, "-m", "tests.ranks.cache_rank"]
    ranks = [
        processes.start(command, stdin=-1, stderr=None, cwd=ROOT, env=os.environ | ring_variables(rank, str(hostfile)))
        for rank in range(case["ranks"])
    ]
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write(json.dumps(case).encode())
        rank.stdin.close()
        rank.stdin = None
    return [json.loads(rank.communicate(timeout=RING_S)[0]) for rank in ranks]


@pytest.mark.parametrize(
    "strategy",
    [pytest.param("hybrid", marks=pytest.mark.sweep), pytest.param("pipeline:3:1", marks=pytest.mark.sweep)],
)
def test_a_ring_reuses_the_blocks_of_the_last_one(tmp_path: Path, strategy: str) -> None:
    case = {"folder": str(KIMI_MINI), "strategy": strategy, "ranks": 2, "cache_dir": str(tmp_path / "cache")}
    case["prompt"] = list(make_prompt(700, 1))
    first = run_ring(case, tmp_path)
    assert [cached for _, cached in first] == [0, 0]
    assert run_ring(case, tmp_path) == [[tokens, 512] for tokens, _ in first]
    lost = sorted((tmp_path / "cache").glob("*/rank-1-of-2/*.safetensors"), key=lambda file: file.stat().st_mtime)
    lost[1].unlink()
    assert run_ring(case, tmp_path) == [[tokens, 256] for tokens, _ in first]
