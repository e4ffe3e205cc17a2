"""Long outages: a download waits for hours, says so, honours Retry-After, and ends at a limit."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kimi_mlx.errors import UnreachableError, WeightsError
from kimi_mlx.hub import retries
from kimi_mlx.hub.client import look_up
from kimi_mlx.hub.fetch import fetch_file
from kimi_mlx.hub.retries import NOTICE_EVERY_S, Retries
from tests.hub import Hub

NAME = "model-1-of-3.safetensors"
HOUR_S = 3600.0


class Clock(threading.Event):
    """A stop event whose waits take no time, and the clock that counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1e6

    def wait(self, timeout: float | None = None) -> bool:
        self.now_s += timeout or 0.0
        return False


@pytest.fixture
def clock(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 1.0)
    monkeypatch.setattr(retries, "MAX_DELAY_S", 1200.0)  # few requests
    monkeypatch.setattr(retries, "MAX_WAIT_S", 2 * HOUR_S)
    monkeypatch.setattr(Retries, "_announced_s", 0.0)
    return clock


OUTAGES: list[dict[str, Any]] = [
    {"status": 503},
    {"status": 429, "headers": {"Retry-After": "300"}},
    {"status": 500, "headers": {"Retry-After": "0"}},
]


@pytest.mark.parametrize("fault", OUTAGES, ids=["503", "429", "500"])
def test_a_download_survives_hours_of_outage(
    hub: Hub, model: Path, tmp_path: Path, clock: Clock, fault: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    repository = look_up("owner/model")
    hub.fail("status", "/cdn/*", times=12, **fault)
    started_s = clock.now_s
    with caplog.at_level(logging.WARNING, "kimi_mlx.hub"):
        fetch_file(repository, repository.file(NAME), tmp_path / "file", stop=clock)
    assert (tmp_path / "file").read_bytes() == (model / NAME).read_bytes()
    waited_s = clock.now_s - started_s
    assert 0.4 * HOUR_S < waited_s < 2 * HOUR_S
    assert waited_s / NOTICE_EVERY_S / 2 <= len(caplog.messages) <= waited_s / NOTICE_EVERY_S + 1
    status = fault["status"]
    assert caplog.messages[0].startswith(f"waiting: Hugging Face answered with status {status}. Trying again in ")
    assert "for up to 2 h" in caplog.messages[0]


@pytest.mark.parametrize("kind", ["status", "drop"])
def test_a_download_ends_after_the_limit(hub: Hub, tmp_path: Path, clock: Clock, kind: Any) -> None:
    repository = look_up("owner/model")
    hub.fail(kind, "/cdn/*")
    started_s = clock.now_s
    with pytest.raises(UnreachableError, match=r"\d+ times in a row"):
        fetch_file(repository, repository.file(NAME), tmp_path / "file", stop=clock)
    assert HOUR_S < clock.now_s - started_s <= 2 * HOUR_S


def test_short_waits_are_not_announced(
    hub: Hub, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    repository = look_up("owner/model")
    hub.fail("status", "/cdn/*", times=2)
    with caplog.at_level(logging.WARNING, "kimi_mlx.hub"):
        fetch_file(repository, repository.file(NAME), tmp_path / "file", stop=clock)
    assert caplog.messages == []


def test_a_look_up_without_a_connection_ends_soon(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UnreachableError, match="4 times in a row"):
        look_up("owner/model")


@pytest.mark.parametrize("is_always", [False, True])
def test_a_response_that_is_not_the_file_is_requested_again(
    hub: Hub, model: Path, tmp_path: Path, is_always: bool
) -> None:
    repository = look_up("owner/model")
    hub.fail("status", "/cdn/*", status=200, **({} if is_always else {"times": 2}))
    if is_always:
        with pytest.raises(WeightsError, match=r"did not answer like a Hugging Face server.* is not that file"):
            fetch_file(repository, repository.file(NAME), tmp_path / "file")
    else:
        fetch_file(repository, repository.file(NAME), tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == (model / NAME).read_bytes()


def test_a_look_up_is_repeated_after_a_page_that_is_not_json(hub: Hub) -> None:
    hub.fail("status", "/api/*", status=200, body=b"<html>please log in</html>", times=2)
    assert look_up("owner/model").name == "owner/model"


def test_many_short_waits_are_announced(
    hub: Hub, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    repository = look_up("owner/model")
    hub.fail("status", "/cdn/*", status=429, times=8, headers={"Retry-After": "1"})
    started_s = clock.now_s
    with caplog.at_level(logging.WARNING, "kimi_mlx.hub"):
        fetch_file(repository, repository.file(NAME), tmp_path / "file", stop=clock)
    assert clock.now_s - started_s == 8.0
    (message,) = caplog.messages
    assert "Trying again in 1 s" in message
