"""Ctrl-C at every stage of every command: it ends quietly, with the right code, and leaves nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.fakes import KIMI_MINI
from tests.hub import Hub
from tests.interrupts import MAIN, Interrupted

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")

INTERRUPTED = 128 + signal.SIGINT
MCP_SERVER = Path(__file__).parents[1] / "mcp_server.py"
Start: TypeAlias = Callable[..., Interrupted]

SLOW_CLOSE = MAIN.replace(
    "main()",
    "import time, kimi_mlx.session.ring as r; c = r.RingSession.close\n"
    "def close(self):\n    time.sleep(3); c(self)\nr.RingSession.close = close\nmain()",
)
"""The program with a ring that takes 3 s to end."""
ENDING = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Start]:
    """Starts programs on terminals of their own, with folders of the test; what they leave is ended."""
    started: list[Interrupted] = []
    folders = {f"XDG_{name}_HOME": str(tmp_path / name) for name in ("STATE", "DATA", "CONFIG", "CACHE")}
    folders["NO_COLOR"] = ""  # with a status line

    def start(*arguments: str, **settings: Any) -> Interrupted:
        started.append(Interrupted(*arguments, **{**folders, **settings}))
        return started[-1]

    yield start
    for program in started:
        program.close()


@pytest.mark.parametrize("after_s", [0.05, 0.3])
def test_ctrl_c_at_the_start_says_nothing(begin: Start, after_s: float) -> None:
    program = begin("chat", "-p", "hi")
    program.run_for(after_s)
    program.press()
    assert program.end() in (-signal.SIGINT, INTERRUPTED)
    program.check_nothing_is_left()


def test_ctrl_c_ends_a_single_answer(begin: Start, endless_model: Path) -> None:
    program = begin("chat", str(endless_model), "-t", "0", "--no-thinking", "-p", "hi")
    program.terminal.expect("answering")
    program.press()
    assert program.end() == INTERRUPTED
    program.check_nothing_is_left()


@pytest.mark.slow
def test_ctrl_c_at_a_question_changes_nothing(begin: Start, tmp_path: Path) -> None:
    (tmp_path / "hub" / "models--owner--model" / "blobs").mkdir(parents=True)
    kept = tmp_path / "hub" / "models--owner--model" / "blobs" / "x"
    kept.write_text("data")
    program = begin("rm", "owner/model", HF_HUB_CACHE=str(tmp_path / "hub"))
    program.terminal.expect("Remove")
    program.press()
    assert program.end() == INTERRUPTED
    program.check_nothing_is_left()
    assert kept.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("chat", "owner/model", "-p", "hi"), ("download", "owner/model", "--ranks", "2")]
)
def test_ctrl_c_during_a_download_is_resumed(begin: Start, arguments: tuple[str, ...], tmp_path: Path) -> None:
    with Hub({"owner/model": KIMI_MINI}) as hub:
        folders = {"HF_HUB_CACHE": str(tmp_path / "hub"), "KIMI_MLX_STORES": str(tmp_path / "stores")}
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **folders}
        hub.fail("slow", "/cdn/*.safetensors", bytes_per_s=200_000)
        program = begin(*arguments, **online)
        program.terminal.expect("MB")  # of the progress
        program.press()
        assert program.end() == INTERRUPTED
        program.check_nothing_is_left()
        hub.clear_faults()
        again = begin(*arguments, **online)
        assert again.terminal.wait() == 0


@pytest.mark.slow
def test_ctrl_c_while_a_server_of_tools_starts_or_runs(begin: Start, endless_model: Path, tmp_path: Path) -> None:
    slow = "import time; time.sleep(100)"
    servers = {
        "slow": {"command": sys.executable, "args": ["-c", slow]},
        "toys": {"command": sys.executable, "args": [str(MCP_SERVER)]},
    }
    for names in (["slow"], ["toys"], ["slow", "toys"]):
        config = tmp_path / "mcp.json"
        config.write_text(json.dumps({"mcpServers": {name: servers[name] for name in names}}))
        program = begin("chat", str(endless_model), "-t", "0", "--no-thinking", "--mcp", str(config), "-p", "hi")
        program.run_for(3.0)
        program.press()
        assert program.end() == INTERRUPTED
        program.check_nothing_is_left()


@pytest.mark.slow
@pytest.mark.ranks
def test_ctrl_c_while_a_ring_restarts(begin: Start, endless_model: Path) -> None:
    program = begin("chat", str(endless_model), "-t", "0", "--no-thinking", "--ranks", "2", "-p", "hi")
    program.terminal.expect("answering")
    program.run_for(1.0)
    ranks = [pid for pid, line in program.processes().items() if "rank.main" in line and "guard" not in line]
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    program.terminal.expect("reconnecting")
    program.press()
    assert program.end() == INTERRUPTED
    program.check_nothing_is_left()


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("number", [None, *(pytest.param(other, marks=pytest.mark.sweep) for other in ENDING)])
def test_a_second_ctrl_c_while_the_ring_ends(begin: Start, endless_model: Path, number: int | None) -> None:
    options = ("-t", "0", "--no-thinking", "--ranks", "2", "-p", "hi")
    program = begin("chat", str(endless_model), *options, code=SLOW_CLOSE)
    program.terminal.expect("answering")
    program.press()
    program.run_for(1.0)
    program.press(number)
    assert program.end() == INTERRUPTED
    program.check_nothing_is_left()


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    "number", [None, *(pytest.param(number, marks=pytest.mark.sweep) for number in (signal.SIGTERM, signal.SIGHUP))]
)
@pytest.mark.parametrize("is_conversation", [False, True])
@pytest.mark.parametrize("seed", [0, *(pytest.param(number, marks=pytest.mark.sweep) for number in (1, 2))])
def test_ctrl_c_at_any_time_of_a_ring(
    begin: Start, endless_model: Path, number: int | None, is_conversation: bool, seed: int
) -> None:
    """Press Ctrl-C, or send a signal, once or twice at a random time of the start, the load, the answer or the end."""
    choice = random.Random(f"{number} {is_conversation} {seed}")
    options = ("-t", "0", "--no-thinking", "--ranks", "2", "--no-log")
    program = begin("chat", str(endless_model), *options, *(() if is_conversation else ("-p", "hi")))
    program.run_for(choice.uniform(0, 8))
    if is_conversation:
        program.terminal.send("hi\r")
        program.run_for(choice.uniform(0, 3))
    program.press(number)
    if choice.random() < 0.5:
        program.run_for(choice.choice((0.0, 0.05, 0.3, 1.0)))
        program.press(number)
    expected = {INTERRUPTED, 0, -signal.SIGINT} if number is None else {128 + number, -number}
    assert program.end() in expected
    program.check_nothing_is_left()
