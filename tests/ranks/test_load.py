"""`kimi_mlx.load` on a group from `mx.distributed.init()`, as a program under `mlx.launch` uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kimi_mlx
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Token
from kimi_mlx.engine.request import Request
from tests.mlx_launch import loopback_hostfile, ring_variables

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
PROMPT = tuple(range(20, 50))
PROGRAM = f"""
import json
import mlx.core as mx
import kimi_mlx
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Token
from kimi_mlx.engine.request import Request
from kimi_mlx.runtime.load import prepare_device

prepare_device()
group = mx.distributed.init(strict=True, backend="ring")
assert group.size() == 2
model, _ = kimi_mlx.load("kimi-mini", group=group)
events = Engine(model).generate(Request({PROMPT}, max_tokens=8))
print(json.dumps([event.id for event in events if isinstance(event, Token)]))
"""


def test_a_group_of_mlx_shares_the_model(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile.json"
    hostfile.write_text(loopback_hostfile(2))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", **ring_variables(rank, str(hostfile))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], [stderr for _, stderr in outputs]
    model, _ = kimi_mlx.load("kimi-mini")
    expected = [event.id for event in Engine(model).generate(Request(PROMPT, max_tokens=8)) if isinstance(event, Token)]
    assert [json.loads(stdout) for stdout, _ in outputs] == [expected, expected]
