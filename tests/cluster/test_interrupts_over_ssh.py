"""Ctrl-C at any time of a chat on two hosts over ssh: it ends quietly, and no process is left on any host."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_endless_checkpoint
from tests.cluster import faults
from tests.cluster.faults import wait_until_gone
from tests.cluster.hosts import Hosts
from tests.interrupts import Interrupted

pytestmark = pytest.mark.slow

GONE_S = 15.0
INTERRUPTED = 130


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that all hosts see, because they share this machine's files, and whose answers never end."""
    return write_endless_checkpoint(tmp_path_factory.mktemp("endless"))


@pytest.fixture
def front(hosts: Hosts) -> Iterator[dict[str, str]]:
    """Variables of the front. After the test its temporary folder must be empty."""
    variables = faults.environment(hosts)
    yield {**variables, "NO_COLOR": "", "TERM": "xterm", "COLUMNS": ""}
    folder = hosts.folder / "front/tmp"
    left = [path.name for path in folder.glob("*")]
    shutil.rmtree(folder, ignore_errors=True)
    assert left == []


@pytest.mark.parametrize(
    "stage",
    ["loading", *(pytest.param(stage, marks=pytest.mark.sweep) for stage in ("contacting", "answering", 0, 1, 2, 3))],
)
def test_ctrl_c_leaves_nothing_on_any_host(
    hosts: Hosts, front: dict[str, str], model: Path, stage: str | int, tmp_path: Path
) -> None:
    """Press Ctrl-C at a stage, or at a random time, with another one soon after it."""
    hostfile = faults.write_hostfile(hosts, tmp_path / "two.json")
    chat = ("chat", str(model), "-t", "0", "--no-thinking", "-p", "hi")
    program = Interrupted("launch", "--hostfile", hostfile, *chat, **front)
    try:
        if stage == "contacting":
            program.run_for(0.8)
        elif isinstance(stage, str):
            program.terminal.expect(stage)
        else:
            choice = random.Random(stage)
            program.run_for(choice.uniform(0, 12))
            program.press()
            program.run_for(choice.choice((0.0, 0.1, 0.5)))
        program.press()
        assert program.end() == INTERRUPTED
        program.check_nothing_is_left()
        assert wait_until_gone(hosts, GONE_S) == []
    finally:
        program.close()
