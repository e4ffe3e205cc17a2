"""Start of a ring, with small programs as its ranks: fast, slow, silent and broken ones."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.cluster.hosts.host import local_cluster
from kimi_mlx.cluster.hosts.launch import FAST_SYNC
from kimi_mlx.cluster.ring import ring as ring_module
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.errors import MissingModelError, RingError
from tests.cluster.hosts import ROOT
from tests.ranks.test_ring import wait_until_gone

pytestmark = pytest.mark.ranks

BEGINNING = """
import os, sys, time
from kimi_mlx.cluster.channel.messages import decode, encode

def send(kind, **fields):
    sys.stdout.buffer.write(encode(kind, **fields))
    sys.stdout.buffer.flush()

def wait_for(kind):
    while (message := decode(sys.stdin.buffer.readline()))["kind"] != kind:
        pass
    return message

def main():
    rank = wait_for("start")["rank"]
    print("process", os.getpid(), file=sys.stderr, flush=True)
"""
LISTENING = f"""{BEGINNING}
    send("listening", pid=os.getpid(), ports=[1], link_port=None)
    wait_for("join")
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the module that the ranks run; tests write it."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return tmp_path / "rank_of_a_test.py"


def make_ring(program: Path, text: str, size: int = 2) -> Ring:
    program.write_text(text)
    return Ring(local_cluster(size), module=program.stem)


def test_messages_of_a_fast_rank_are_kept_while_a_slow_rank_joins(program: Path) -> None:
    text = f"""{LISTENING}
    if rank == 1:
        time.sleep(1)
    send("joined")
    send("tested", mismatches=[])
    send("loading", done=1, total=2)
    send("loading", done=2, total=2)
    send("ready")
    sys.stdin.read()
"""
    with make_ring(program, text) as ring:
        ring.start()
        early = [(rank, message["kind"]) for rank, message in ring._early]
        assert early == [(0, "loading"), (0, "loading"), (0, "ready")]
        received: dict[int, list[str]] = {0: [], 1: []}
        for rank, message in ring.messages():
            received[rank].append(message["kind"] + str(message.get("done", "")))
            if all(kinds[-1:] == ["ready"] for kinds in received.values()):
                break
        assert received == {rank: ["loading1", "loading2", "ready"] for rank in (0, 1)}
        pids = ring.pids
    wait_until_gone(pids)


@pytest.mark.parametrize(
    ("limit", "text", "message"),
    [
        (
            "START_S",
            f"{BEGINNING}    time.sleep(100 * (rank == 1))",
            r"rank 0 of 2 \(not yet started\) exited with code 0",
        ),
        (
            "START_S",
            f"{BEGINNING}    send('alive')\n    time.sleep(100)",
            r"rank \d of 2 \(not yet started\) did not start within 2 s",
        ),
        (
            "JOIN_S",
            f"{LISTENING}    time.sleep(100)",
            r"rank \d of 2 \(process \d+\) could not connect to the other ranks at 127\.0\.0\.1 within 2 s",
        ),
        pytest.param(
            "TEST_S",
            f"{LISTENING}    send('joined')\n    time.sleep(100)",
            r"rank \d of 2 \(process \d+\) did not finish the link test within 2 s",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ends", "never sends a message", "does not join", "is not tested"],
)
def test_a_rank_that_does_not_start_in_time_is_an_error(
    program: Path, limit: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_module, limit, 2.0)
    ring = make_ring(program, text)
    with pytest.raises(RingError, match=message) as raised:
        ring.start()
    pids = [int(number) for number in re.findall(r"\n  process (\d+)", raised.value.message)]
    assert pids  # from its last lines
    wait_until_gone(pids)
    logs = [file.read_text() for file in (program.parent / "kimi-mlx/logs").iterdir()]
    wait_until_gone([int(log.split()[1]) for log in logs if log])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise OSError('broken on purpose')", "OSError: broken on purpose"),
        pytest.param("def main(): 1 / 0", "ZeroDivisionError", marks=pytest.mark.slow),
        pytest.param("def other(): pass", "cannot import name 'main'", marks=pytest.mark.slow),
    ],
)
def test_the_error_of_a_rank_that_fails_at_once_has_its_last_lines(program: Path, text: str, message: str) -> None:
    ring = make_ring(program, text)
    with pytest.raises(
        RingError, match=r"rank \d of 2 \(not yet started\) exited with code 1; its last lines:"
    ) as raised:
        ring.start()
    assert message in raised.value.message
    assert re.search(r"its log is \S+-rank-\d\.log$", raised.value.hint or "")


def test_a_note_is_in_the_log_but_not_in_the_error(program: Path) -> None:
    ring = make_ring(program, f"{LISTENING}    send('note', text='by the way')\n    sys.exit(3)")
    with pytest.raises(RingError, match="exited with code 3") as raised:
        ring.start()
    assert "by the way" not in raised.value.message
    assert {"by the way" in log.read_text() for log in (program.parent / "kimi-mlx/logs").iterdir()} == {True}


@pytest.mark.parametrize(
    ("envs", "is_asked", "value"), [([], False, "0"), ([], True, "1"), ([f"{FAST_SYNC}=1"], False, "1")]
)
def test_only_an_option_or_the_hostfile_turns_on_fast_sync(
    envs: list[str], is_asked: bool, value: str, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAST_SYNC, "1")  # set by the user, not by kimi-mlx
    program.write_text(f"""
import os
from kimi_mlx.errors import MissingModelError
from kimi_mlx.rank.channel import run_rank

def serve(channel, start):
    raise MissingModelError(os.environ["{FAST_SYNC}"])

def main():
    run_rank(serve)
""")
    cluster = local_cluster(1, is_asked)
    cluster = replace(cluster, hostfile=cluster.hostfile.with_envs(envs))
    assert cluster.hostfile.has_fast_sync == (value == "1")
    with pytest.raises(MissingModelError, match=f"^{value}$"):
        Ring(cluster, module=program.stem).start()


def test_an_error_of_a_rank_at_its_start_is_raised_unchanged(program: Path) -> None:
    text = """
from kimi_mlx.errors import MissingModelError
from kimi_mlx.rank.channel import run_rank

def serve(channel, start):
    raise MissingModelError("nothing here", hint="look there", rank=start["rank"])

def main():
    run_rank(serve)
"""
    ring = make_ring(program, text, size=1)
    with pytest.raises(MissingModelError, match="nothing here") as raised:
        ring.start()
    assert (raised.value.hint, raised.value.rank) == ("look there", 0)
    assert os.environ.get("MLX_RANK") is None
