"""Ranks release their memory and end by themselves; only a rank that is stuck is killed. SIGKILLs are counted."""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.cluster.hosts.host import local_cluster
from kimi_mlx.cluster.ring import end_limits, ending, guard
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.cluster.ring.watch import RingTimeouts
from kimi_mlx.engine.events import Encoded, Event, Finished, Interrupted, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import RingError
from kimi_mlx.session.job import Job
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import SessionOptions
from tests.checkpoints import load_golden, write_checkpoint
from tests.fakes import KIMI_MINI
from tests.images import make_image
from tests.ranks.image_rank import make_request
from tests.ranks.kill_count import KILL, Kills, count_kills
from tests.ranks.test_ring import events_with_action, tokens_of, wait_until_gone

pytestmark = pytest.mark.ranks

PROMPT = tuple(range(20, 60))
ENDLESS = Request(PROMPT, max_tokens=5000, stop_ids=frozenset())
STUCK = """
import time
from kimi_mlx.rank.channel import run_rank
from kimi_mlx.rank.rendezvous import join_group

def serve(channel, start):
    join_group(channel, start)
    channel.send("ready")
    while True:  # as in a collective that cannot be aborted
        try:
            time.sleep(100)
        except SystemExit:
            pass

def main():
    run_rank(serve)
"""


@pytest.fixture
def kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kills:
    """Count the SIGKILLs of this process and of the guards."""
    monkeypatch.setattr("kimi_mlx.session.restart_policy.RESTART_DELAYS_S", (0.1,))
    return count_kills(tmp_path / "counter", monkeypatch)


def check_unloaded(ring: Ring, *ranks: int) -> None:
    for rank in ranks:
        assert ring._ends[rank].is_unloaded
        assert ring._ends[rank].held_bytes < 1000  # constants of modules


@pytest.mark.parametrize("strategy", ["hybrid", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_an_end_in_the_middle_of_an_answer_kills_nobody(strategy: str, kills: Kills) -> None:
    with closing(RingSession(SessionOptions(KIMI_MINI, ranks=2, strategy=strategy))) as session:
        pids, ring = session.pids, session._ring
        events = session.generate(ENDLESS)
        while not isinstance(next(events), Token):
            pass
        began = time.monotonic()
    assert time.monotonic() - began < 8
    check_unloaded(ring, 0, 1)
    wait_until_gone(pids, 1)
    assert kills.sent == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["hybrid", pytest.param("pipeline", marks=pytest.mark.sweep)])
def test_an_end_while_16_384_patches_are_encoded_kills_nobody(strategy: str, kills: Kills, tmp_path: Path) -> None:
    golden = load_golden("k2.5")
    folder = write_checkpoint(tmp_path / "k2.5", golden.config, golden.seed)
    request = make_request(range(5), make_image(1, (4, 64, 64)), [1], max_tokens=2)
    with closing(RingSession(SessionOptions(folder, ranks=2, strategy=strategy))) as session:
        pids, ring = session.pids, session._ring
        events = session.generate(request)
        event = next(event for event in events if isinstance(event, Encoded))
        assert event.done < event.total
        began = time.monotonic()
    assert time.monotonic() - began < 8
    check_unloaded(ring, 0, 1)
    wait_until_gone(pids, 1)
    assert kills.sent == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "strategy", "lost", "size"),
    [  # most of them are left to the sweep
        pytest.param(signal.SIGKILL, "hybrid", 0, 2, marks=pytest.mark.sweep),
        pytest.param(signal.SIGKILL, "hybrid", 1, 3, marks=pytest.mark.sweep),
        pytest.param(signal.SIGKILL, "pipeline", 1, 2, marks=pytest.mark.sweep),
        (signal.SIGKILL, "pipeline", 2, 3),
        pytest.param(signal.SIGSTOP, "hybrid", 1, 2, marks=pytest.mark.sweep),
        pytest.param(signal.SIGSTOP, "pipeline", 0, 2, marks=pytest.mark.sweep),
        (signal.SIGTERM, "hybrid", 0, 2),
        pytest.param(signal.SIGTERM, "pipeline", 1, 3, marks=pytest.mark.sweep),
    ],
)
def test_a_restart_kills_nobody(number: signal.Signals, strategy: str, lost: int, size: int, kills: Kills) -> None:
    """Also not the rank that was stopped, and not the one that waits in a collective for the lost rank."""
    request = Request(PROMPT, max_tokens=120, stop_ids=frozenset())
    options = SessionOptions(KIMI_MINI, ranks=size, strategy=strategy, timeouts=RingTimeouts(silence_s=3))
    ends = []
    with closing(LocalSession(SessionOptions(KIMI_MINI))) as alone:
        expected = tokens_of(alone, request)
    with closing(RingSession(options)) as session:
        first_pids, ring = session.pids, session._ring
        start = ring.start
        ring.start = lambda **settings: (ends.append(ring._ends), start(**settings))  # pyright: ignore
        events: list[Event] = events_with_action(session, request, 10, lambda: KILL(session.pids[lost], number))
        wait_until_gone(first_pids, 1)
    assert [event.id for event in events if isinstance(event, Token)] == expected
    [interrupted] = [event for event in events if isinstance(event, Interrupted)]
    if number != signal.SIGSTOP:
        assert f"was ended by {number.name}" in interrupted.reason
    assert isinstance(events[-1], Finished)
    unloaded = {rank for rank, end in ends[0].items() if end.is_unloaded}
    assert unloaded == set(range(size)) - ({lost} if number == signal.SIGKILL else set())
    assert kills.sent == []


@pytest.mark.slow
def test_ctrl_c_while_the_ranks_load_kills_nobody(kills: Kills, monkeypatch: pytest.MonkeyPatch) -> None:
    rings: list[Ring] = []
    start = Ring.start

    def remember_and_start(ring: Ring, **settings: object) -> None:
        rings.append(ring)
        start(ring, **settings)

    def interrupt(done: int, total: int, rank: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ring, "start", remember_and_start)
    with pytest.raises(KeyboardInterrupt):
        RingSession(SessionOptions(KIMI_MINI, ranks=2), interrupt)
    check_unloaded(rings[0], 0, 1)
    wait_until_gone(rings[0].pids, 1)
    assert kills.sent == []


@pytest.mark.slow
def test_only_a_stuck_rank_is_killed_and_that_is_said(
    kills: Kills, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (kills.folder / "stuck_rank.py").write_text(STUCK)
    with (kills.folder / "sitecustomize.py").open("a") as file:
        file.write("from kimi_mlx.cluster.ring import end_limits\n")
        file.write("end_limits.END_LIMITS_S = {'idle': 1.0}; end_limits.KILL_S = 1.0\n")
    monkeypatch.setattr(ending, "SHOW_AFTER_S", 0.5)
    ring = Ring(local_cluster(2), module="stuck_rank")
    ring.start()
    for _, message in ring.messages():
        if message["kind"] == "ready":
            break
    pids = ring.pids
    with caplog.at_level(logging.WARNING):
        ring.close()
    wait_until_gone(pids, 1)
    assert len(kills.sent) == 2
    [waiting, killed] = [record.getMessage() for record in caplog.records]
    assert "waiting for rank 0 of 2" in waiting
    assert killed.startswith("killed: rank 0 of 2 (process ")
    assert "may stay in use until that Mac restarts; `kimi-mlx doctor` shows it" in killed


@pytest.mark.slow
def test_a_rank_whose_commands_cannot_be_read_says_so(kills: Kills) -> None:
    with closing(RingSession(SessionOptions(KIMI_MINI, ranks=2, max_restarts=0))) as session:
        ring, pids = session._ring, session.pids
        ring._ranks[1].write(b'{"kind":"cancel","reque\n')
        with pytest.raises(RingError) as raised:
            list(session.generate(ENDLESS))
        assert raised.match(rf"^rank 1 of 2 \(process {pids[1]}\) cannot read its commands: a line that is not a mess")
    assert kills.sent == []


@pytest.mark.slow
def test_the_prompt_cache_of_a_ring_is_written_at_its_end(tmp_path: Path, kills: Kills) -> None:
    """Also the blocks of an answer that is cancelled by the end."""
    request = Request(tuple(20 + i * i % 1700 for i in range(700)), max_tokens=2000, stop_ids=frozenset())
    options = SessionOptions(KIMI_MINI, ranks=2, cache_dir=tmp_path / "cache")
    with closing(RingSession(options)) as session:
        events = session.generate(request)
        while not isinstance(next(events), Token):
            pass
    blocks = [len(list((tmp_path / "cache").glob(f"*/rank-{rank}-of-2/*.safetensors"))) for rank in (0, 1)]
    assert blocks[0] == blocks[1] >= 2
    with closing(RingSession(options)) as session:
        assert [usage.disk_blocks for usage in session.status().cache_usage] == blocks
        [first, *_] = session.generate(Request(request.prompt, max_tokens=1))
        assert getattr(first, "done", 0) >= 512
        usages = session.status().cache_usage
    assert [(usage.prompt_tokens, usage.disk_hit_tokens) for usage in usages] == [(700, 512)] * 2
    assert kills.sent == []


def test_limits_grow_with_the_weights() -> None:
    assert end_limits.unload_limit_s(0) == end_limits.UNLOAD_S
    assert end_limits.unload_limit_s(300 * 10**9) > 120
    assert end_limits.end_limit_s("load") > end_limits.end_limit_s("decode")
    assert guard.HOLD_S > end_limits.ABORT_AFTER_S + 2


@pytest.mark.slow
def test_status_and_cancel_do_not_wait_while_a_restart_encodes_prompts(
    kills: Kills, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, is_encoding, may_go_on = Job.encode, threading.Event(), threading.Event()
    with closing(RingSession(SessionOptions(KIMI_MINI, ranks=2))) as session:
        events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        session.submit(ENDLESS, events.put)
        while not isinstance(events.get(timeout=30), Token):
            pass

        def slow(job: Job) -> bytes:
            is_encoding.set()
            assert may_go_on.wait(30)
            return encode(job)

        monkeypatch.setattr(Job, "encode", slow)
        KILL(session.pids[1], signal.SIGKILL)
        assert is_encoding.wait(30)
        began = time.monotonic()
        status = session.status()
        session.cancel_all()
        assert time.monotonic() - began < 1
        assert (status.is_up, status.restarts) == (False, 1)
        assert "was ended by SIGKILL" in str(status.reason)
        may_go_on.set()
        while not isinstance(event := events.get(timeout=30), Finished):
            pass
        assert event.reason == "cancelled"
        monkeypatch.undo()
        assert len(tokens_of(session, Request(PROMPT, max_tokens=5, stop_ids=frozenset()))) == 5
