"""Images on real rings: the same text as in one process with every placement, and after the loss of a rank."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.engine.events import Encoded, Event, Finished, Interrupted, Prefilled, Token
from kimi_mlx.errors import EngineError
from kimi_mlx.parallel.placement import STRATEGIES
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import SessionOptions
from tests.checkpoints import load_golden, write_checkpoint
from tests.images import make_image
from tests.ranks.image_rank import TEXT, answer, make_request
from tests.ranks.kill_count import KILL
from tests.ranks.test_placements import run_ring

pytestmark = pytest.mark.ranks

GOLDEN = load_golden("k2.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("k2.5"), GOLDEN.config, GOLDEN.seed)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.sweep)])
def test_every_placement_answers_prompts_with_images_as_one_process(folder: Path, size: int, tmp_path: Path) -> None:
    *expected, _ = answer({"folder": str(folder), "strategy": "hybrid", "speculate": 0}, None)
    assert [len(tokens) for tokens in expected] == [10, 14, 8, 1, 12, 3]
    cases = [
        {"folder": str(folder), "strategy": strategy, "speculate": speculate}
        for strategy in STRATEGIES
        for speculate in ([0, 3] if strategy in ("hybrid", "pipeline") else [0])
    ]
    by_rank = run_ring(size, cases, tmp_path, "tests.ranks.image_rank")
    for case, *by_case in zip(cases, *by_rank, strict=True):
        for rank, (*answers, num_encoded) in enumerate(by_case):
            if rank == 0 or case["strategy"] != "pipeline":  # only rank 0 of a pipeline knows every token
                assert answers == expected, (case, rank)
            assert num_encoded == by_case[0][-1], case


LONG = make_request(
    TEXT[:5],
    *(part for seed in range(5) for part in (make_image(40 + seed, (1, 24, 24)), TEXT[:5])),
    make_image(50, (1, 48, 48)),  # more tokens than a chunk
    TEXT[5:9],
    max_tokens=60,
)


def is_first_part(event: Event) -> bool:
    return isinstance(event, Encoded)


def is_inside_an_image(event: Event) -> bool:
    return isinstance(event, Prefilled) and any(image.start < event.done < image.stop for image in LONG.images)


def is_token(event: Event) -> bool:
    return isinstance(event, Token)


@pytest.fixture(autouse=True)
def restarts_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_mlx.session.restart_policy.RESTART_DELAYS_S", (0.1,))


def tokens_of(events: Iterator[Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


@pytest.mark.parametrize(
    ("strategy", "lost", "is_moment"),
    [  # most of them are left to the sweep
        pytest.param("hybrid", 0, is_first_part, marks=pytest.mark.sweep),
        pytest.param("pipeline", 1, is_first_part, marks=pytest.mark.slow),
        pytest.param("hybrid", 1, is_inside_an_image, marks=pytest.mark.sweep),
        pytest.param("pipeline", 0, is_inside_an_image, marks=pytest.mark.sweep),
        pytest.param("tensor", 0, is_token, marks=pytest.mark.sweep),
    ],
)
def test_an_answer_about_images_resumes_after_a_rank_is_killed(
    folder: Path, strategy: str, lost: int, is_moment: Callable[[Event], bool]
) -> None:
    with closing(LocalSession(SessionOptions(folder))) as alone:
        expected = tokens_of(alone.generate(LONG))
    with closing(RingSession(SessionOptions(folder, ranks=2, strategy=strategy))) as ring:
        assert ring.image_error is None
        events: list[Event] = []
        for event in ring.generate(LONG):
            events.append(event)
            if is_moment(event) and not any(map(is_moment, events[:-1])):
                KILL(ring.pids[lost], signal.SIGKILL)
        assert len([event for event in events if isinstance(event, Interrupted)]) == 1
        assert tokens_of(iter(events)) == expected


@pytest.mark.slow
def test_a_ring_of_a_model_without_vision_says_so(tmp_path: Path) -> None:
    golden = load_golden("k2")
    folder = write_checkpoint(tmp_path, golden.config, golden.seed)
    with closing(RingSession(SessionOptions(folder, ranks=2))) as ring:
        assert ring.image_error is not None
        with pytest.raises(EngineError, match="does not see images"):
            next(ring.generate(make_request(TEXT[:5], make_image(1))))


@pytest.mark.slow
def test_requests_are_cancelled_while_their_images_are_sent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_mlx.session.image_upload.PART_BYTES", 512)
    big = make_image(3, (1, 24, 24))
    request = make_request(TEXT[:3], big, max_tokens=2)
    with closing(RingSession(SessionOptions(folder, ranks=2))) as ring:
        expected = tokens_of(ring.generate(request))
        events: list[Event | BaseException] = []
        request_id = ring.submit(request, events.append)
        ring.cancel(request_id)
        assert tokens_of(ring.generate(request)) == expected
        [end] = [event for event in events if isinstance(event, Finished)]
        assert end.reason == "cancelled"
        assert not ring._uploader._num_requests
