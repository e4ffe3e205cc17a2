"""Local rings of real ranks generate the same tokens as one process, even when ranks are lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.cluster.ring.watch import RingTimeouts
from kimi_mlx.engine.events import Event, Finished, Interrupted, Prefilled, Resumed, Token
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import EngineError, PlacementError, RingError
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import SessionOptions
from tests.checkpoints import load_golden, quantize_checkpoint, write_checkpoint
from tests.ranks.kill_count import KILL, count_kills

pytestmark = pytest.mark.ranks

GOLDEN = load_golden("k2.5")
PROMPT = tuple(int(i) for i in GOLDEN.input_ids[0, :50])
SAMPLED = Sampling(temperature=0.7, top_p=0.9, seed=5)
QUICK = RingTimeouts(silence_s=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = write_checkpoint(tmp_path_factory.mktemp("float"), GOLDEN.config, GOLDEN.seed)
    return quantize_checkpoint(source, tmp_path_factory.mktemp("quantized"), bits=4, group_size=32)


@pytest.fixture(autouse=True)
def kills_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restart quickly; check that neither an end nor a restart kills a rank."""
    monkeypatch.setattr("kimi_mlx.session.restart_policy.RESTART_DELAYS_S", (0.1,))
    kills = count_kills(tmp_path / "counter", monkeypatch)
    yield
    assert kills.sent == []


def tokens_of(session: LocalSession | RingSession, request: Request) -> list[int]:
    return [event.id for event in session.generate(request) if isinstance(event, Token)]


def is_alive(pid: int) -> bool:
    try:
        KILL(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pids: list[int], limit_s: float = 10) -> None:
    end = time.monotonic() + limit_s
    while any(is_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_alive(pid)]


@pytest.mark.slow
def test_three_ranks_generate_the_same_as_one_process(folder: Path) -> None:
    request = Request(PROMPT, max_tokens=8)
    with closing(LocalSession(SessionOptions(folder))) as alone:
        expected = tokens_of(alone, request)
    with closing(RingSession(SessionOptions(folder, ranks=3))) as ring:
        assert tokens_of(ring, request) == expected
        pids = ring.pids
    wait_until_gone(pids)


def test_two_ranks_generate_the_same_as_one_process_even_after_a_cancelled_or_refused_request(folder: Path) -> None:
    request = Request(PROMPT, max_tokens=10)
    follow_up = Request((*PROMPT, 1, 2, 3), max_tokens=8)
    with closing(LocalSession(SessionOptions(folder))) as alone:
        expected, expected_later = tokens_of(alone, request), tokens_of(alone, follow_up)
    with closing(RingSession(SessionOptions(folder, ranks=2))) as ring:
        assert tokens_of(ring, request) == expected
        assert tokens_of(ring, follow_up) == expected_later
        looked_up = [usage.prompt_tokens for usage in ring.status().cache_usage]
        assert looked_up == [len(PROMPT) + len(follow_up.prompt)] * 2
        with pytest.raises(EngineError, match="the context holds") as refused:
            tokens_of(ring, Request((1,) * 300_000))
        assert refused.value.hint is not None
        events = ring.generate(Request(PROMPT, max_tokens=2000))
        for _ in range(5):
            next(events)
        events.close()  # pyright: ignore[reportAttributeAccessIssue]
        assert tokens_of(ring, request) == expected
        seen = []
        for event in ring.generate(Request(PROMPT, max_tokens=2000)):
            if isinstance(event, Token):
                ring.cancel_all()
            seen.append(event)
        assert isinstance(seen[-1], Finished)
        assert seen[-1].reason == "cancelled"
        assert tokens_of(ring, request) == expected
        ring.reset()
        first = next(iter(ring.generate(request)))
        assert first == Prefilled(0, len(PROMPT))
        pids = ring.pids
    wait_until_gone(pids)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [pytest.param("hybrid", marks=pytest.mark.sweep), "pipeline"])
def test_requests_of_several_threads_are_independent(folder: Path, strategy: str) -> None:
    """Meanwhile other requests are cancelled or refused, caches are reset, and two requests sample without a seed."""
    requests = [Request(PROMPT[:length], max_tokens=40 - length) for length in (3, 9, 17, 30)]
    unseeded = Request(PROMPT, max_tokens=20, sampling=Sampling(temperature=1.0))
    with closing(LocalSession(SessionOptions(folder))) as alone:
        expected = [tokens_of(alone, request) for request in requests]
    with closing(RingSession(SessionOptions(folder, ranks=2, strategy=strategy))) as ring:

        def disturb() -> None:
            for count in (1, 4, 7):
                events = ring.generate(Request(PROMPT, max_tokens=3000))
                for _ in range(count):
                    next(events)
                events.close()  # pyright: ignore[reportAttributeAccessIssue]
                ring.reset()
            with pytest.raises(EngineError):
                tokens_of(ring, Request((1,) * 300_000))

        with ThreadPoolExecutor(8) as pool:
            disturbance = pool.submit(disturb)
            sampled = [pool.submit(tokens_of, ring, unseeded) for _ in range(2)]
            answers = [pool.submit(tokens_of, ring, request) for request in requests * 2]
            assert [answer.result(120) for answer in answers] == expected * 2
            assert [len(answer.result(120)) for answer in sampled] == [20, 20]
            disturbance.result(120)


def events_with_action(ring: RingSession, request: Request, after: int, action: Callable[[], None]) -> list[Event]:
    """Return the events of a request; call `action` after a number of tokens."""
    events: list[Event] = []
    for event in ring.generate(request):
        events.append(event)
        if len([each for each in events if isinstance(each, Token)]) == after and isinstance(event, Token):
            action()
    return events


@pytest.mark.parametrize(
    ("strategy", "lost", "sampling"),
    [
        ("hybrid", 1, Sampling()),
        pytest.param("pipeline", 1, Sampling(), marks=pytest.mark.sweep),
        pytest.param("hybrid", 0, SAMPLED, marks=pytest.mark.sweep),
        pytest.param("pipeline", 0, SAMPLED, marks=pytest.mark.slow),
    ],
    ids=["greedy", "pipeline", "sampled", "pipeline-sampled"],
)
def test_an_answer_resumes_after_a_rank_is_killed(folder: Path, strategy: str, lost: int, sampling: Sampling) -> None:
    request = Request(PROMPT, max_tokens=40, sampling=sampling)
    with closing(LocalSession(SessionOptions(folder))) as alone:
        expected = tokens_of(alone, request)
    with closing(RingSession(SessionOptions(folder, ranks=2, strategy=strategy))) as ring:
        first_pids = ring.pids
        times: list[float] = []

        def kill() -> None:
            times.append(time.monotonic())
            KILL(ring.pids[lost], signal.SIGKILL)

        events = events_with_action(ring, request, 10, kill)
        assert [event.id for event in events if isinstance(event, Token)] == expected
        [interrupted] = [event for event in events if isinstance(event, Interrupted)]
        assert f"rank {lost} of 2 (process {first_pids[lost]}) was ended by SIGKILL" in interrupted.reason
        assert (interrupted.attempt, interrupted.attempts) == (1, 3)
        [resumed] = [event for event in events if isinstance(event, Resumed)]
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert finished.reason == "length"
        assert (finished.statistics.prompt_tokens, finished.statistics.generated_tokens) == (len(PROMPT), 40)
        assert finished.statistics.decode_s > resumed.seconds
        wait_until_gone(first_pids)
        pids = ring.pids
    wait_until_gone(pids)


@pytest.mark.slow
def test_a_rank_lost_while_idle_is_restarted(folder: Path) -> None:
    request = Request(PROMPT, max_tokens=5)
    with closing(RingSession(SessionOptions(folder, ranks=2))) as ring:
        expected = tokens_of(ring, request)
        pids = ring.pids
        KILL(pids[1], signal.SIGKILL)
        wait_until_gone(pids)  # noticed without a request
        assert tokens_of(ring, request) == expected


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["hybrid", pytest.param("pipeline", marks=pytest.mark.sweep)])
def test_a_stopped_rank_is_replaced(folder: Path, strategy: str) -> None:
    request = Request(PROMPT, max_tokens=120)
    with closing(LocalSession(SessionOptions(folder))) as alone:
        expected = tokens_of(alone, request)
    with closing(RingSession(SessionOptions(folder, ranks=2, timeouts=QUICK, strategy=strategy))) as ring:
        pids = ring.pids
        events = events_with_action(ring, request, 10, lambda: KILL(pids[1], signal.SIGSTOP))
        assert [event.id for event in events if isinstance(event, Token)] == expected
        [interrupted] = [event for event in events if isinstance(event, Interrupted)]
        assert f"rank 1 of 2 (process {pids[1]}) has not responded for " in interrupted.reason
        assert interrupted.reason.endswith(" s (limit 3 s)")
    wait_until_gone(pids)


@pytest.mark.slow
def test_cancelling_does_not_wait_for_the_restart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_mlx.session.restart_policy.RESTART_DELAYS_S", (2.0,))
    with closing(RingSession(SessionOptions(folder, ranks=2))) as ring:
        events: list[Event] = []
        stopped_at = 0.0
        for event in ring.generate(Request(PROMPT, max_tokens=5000)):
            if isinstance(event, Token) and not any(isinstance(each, Token) for each in events):
                KILL(ring.pids[1], signal.SIGKILL)
            if isinstance(event, Interrupted):
                ring.cancel_all()
                stopped_at = time.monotonic()
            events.append(event)
        assert time.monotonic() - stopped_at < 2
        assert isinstance(events[-1], Finished)
        assert events[-1].reason == "cancelled"
        request = Request(PROMPT, max_tokens=5)
        seen = list(ring.generate(request))  # submitted while the ring is down
        assert isinstance(seen[0], Interrupted)
        assert len([event for event in seen if isinstance(event, Token)]) == 5


@pytest.mark.slow
def test_without_restarts_the_session_fails(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(RingSession(SessionOptions(folder, ranks=2, max_restarts=0))) as ring:
        pids = ring.pids
        events = ring.generate(Request(PROMPT, max_tokens=5000))
        next(events)
        KILL(pids[0], signal.SIGKILL)
        with pytest.raises(RingError, match=r"rank 0 of 2 \(process \d+\) was ended by SIGKILL") as raised:
            for _ in events:
                pass
        assert "kimi-mlx doctor" in str(raised.value.hint)
        with pytest.raises(RingError, match="SIGKILL"):
            next(ring.generate(Request(PROMPT)))
    wait_until_gone(pids)
    assert "killed:" not in caplog.text  # only what we kill is reported so


def test_too_many_ranks_are_refused(folder: Path) -> None:
    with pytest.raises(PlacementError, match="but there are 64 ranks"):
        RingSession(SessionOptions(folder, ranks=64))


def test_ranks_end_when_the_front_is_killed(folder: Path) -> None:
    code = f"""
import time
from pathlib import Path
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import SessionOptions
ring = RingSession(SessionOptions(Path({str(folder)!r}), ranks=2))
print(*ring.pids, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout is not None
        pids = [int(pid) for pid in front.stdout.readline().split()]
        KILL(front.pid, signal.SIGKILL)
    assert len(pids) == 2
    wait_until_gone(pids)


@pytest.mark.slow
def test_no_temporary_file_is_left(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with closing(RingSession(SessionOptions(folder, ranks=2))):
        assert len(list(temporary.iterdir())) == 2
    assert not list(temporary.iterdir())
