"""Download of one file, with every kind of failure."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.errors import WeightsError
from kimi_mlx.hub import fetch, partial_file, retries, xet
from kimi_mlx.hub.client import look_up
from kimi_mlx.hub.fetch import fetch_file, read_range
from kimi_mlx.hub.repository import Repository, RepositoryFile
from kimi_mlx.hub.retries import Cancelled
from tests.hub import Hub

NAME = "model-1-of-3.safetensors"
KEY = f"owner/model/{NAME}"
SIZE = 300_000
SMALL = "config.json"


@pytest.fixture
def repository(hub: Hub) -> Repository:
    return look_up("owner/model")


@pytest.fixture
def weights(repository: Repository) -> RepositoryFile:
    return repository.file(NAME)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "to" / "target"


def get(repository: Repository, target: Path, name: str = NAME) -> list[int]:
    """Fetch and return the progress."""
    progress: list[int] = []
    fetch_file(repository, repository.file(name), target, progress.append)
    return progress


def assert_downloaded(target: Path, model: Path, name: str = NAME) -> None:
    assert target.read_bytes() == (model / name).read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("name", [NAME, SMALL, "tiktoken.model"])
def test_a_file_arrives_once(hub: Hub, repository: Repository, model: Path, target: Path, name: str) -> None:
    progress = get(repository, target, name)
    assert_downloaded(target, model, name)
    assert sum(progress) == target.stat().st_size == hub.sent_bytes
    hub.reset_counts()
    assert get(repository, target, name) == [target.stat().st_size]
    assert hub.requests == []


def test_an_empty_file(hub: Hub, model: Path, target: Path) -> None:
    (model / "empty.json").touch()
    assert get(look_up("owner/model"), target, "empty.json") == []
    assert target.read_bytes() == b""


def test_resume_from_a_partial_file(hub: Hub, repository: Repository, model: Path, target: Path) -> None:
    target.parent.mkdir()
    partial_file.part_path(target).write_bytes((model / NAME).read_bytes()[:200_000])
    progress = get(repository, target)
    assert_downloaded(target, model)
    assert progress[0] == 200_000
    assert sum(progress) == SIZE
    assert hub.sent_bytes == SIZE - 200_000


def test_a_complete_partial_file_is_only_verified(hub: Hub, repository: Repository, model: Path, target: Path) -> None:
    target.parent.mkdir()
    partial_file.part_path(target).write_bytes((model / NAME).read_bytes())
    assert sum(get(repository, target)) == SIZE
    assert_downloaded(target, model)
    assert hub.sent_bytes == 0


@pytest.mark.parametrize("left", [bytes(SIZE + 1), bytes(SIZE), bytes(1000)], ids=["longer", "full", "begun"])
def test_a_wrong_partial_file_is_discarded(repository: Repository, model: Path, target: Path, left: bytes) -> None:
    target.parent.mkdir()
    partial_file.part_path(target).write_bytes(left)
    assert sum(get(repository, target)) == SIZE
    assert_downloaded(target, model)


def test_a_target_of_another_size_is_replaced(repository: Repository, model: Path, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"old")
    get(repository, target)
    assert_downloaded(target, model)


FAULTS: dict[str, Callable[[Hub], None]] = {
    "drop": lambda hub: hub.fail("drop", "/cdn/*", after_bytes=50_000, times=5),
    "drop at once": lambda hub: hub.fail("drop", "/cdn/*", times=7),
    "503": lambda hub: hub.fail("status", "/cdn/*", status=503, times=7),
    "500 of the hub": lambda hub: hub.fail("status", "*/resolve/*", status=500, times=7),
    "408": lambda hub: hub.fail("status", "/cdn/*", status=408, times=1),
    "429": lambda hub: hub.fail("status", "/cdn/*", status=429, times=2, headers={"Retry-After": "0"}),
    "stall": lambda hub: hub.fail("stall", "/cdn/*", after_bytes=50_000, times=1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_transient_fault_loses_no_bytes(
    hub: Hub, repository: Repository, model: Path, target: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    FAULTS[fault](hub)
    assert sum(get(repository, target)) == SIZE
    assert_downloaded(target, model)
    assert hub.sent_bytes == SIZE


def test_progress_resets_the_number_of_failures(hub: Hub, repository: Repository, model: Path, target: Path) -> None:
    hub.fail("drop", "/cdn/*", after_bytes=SIZE // 12)  # more often than is allowed in a row
    get(repository, target)
    assert_downloaded(target, model)
    assert hub.sent_bytes == SIZE


def test_a_server_without_range_requests(hub: Hub, repository: Repository, model: Path, target: Path) -> None:
    hub.fail("ignore_range")
    hub.fail("drop", after_bytes=100_000, times=2)
    assert sum(get(repository, target)) == SIZE
    assert_downloaded(target, model)
    assert hub.sent_bytes == 200_000 + SIZE


def test_give_up_on_a_server_without_progress(
    hub: Hub, repository: Repository, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.1)
    hub.fail("ignore_range")
    hub.fail("drop", after_bytes=100_000)
    with pytest.raises(WeightsError, match="cannot download `owner/model`"):
        get(repository, target)
    assert partial_file.part_path(target).stat().st_size == 100_000


def test_out_of_retries(hub: Hub, repository: Repository, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.1)
    hub.fail("drop", "/cdn/*")
    with pytest.raises(WeightsError, match=r"cannot download `owner/model`: ") as raised:
        get(repository, target)
    assert raised.value.hint == "check the network, then run the same command again to resume"
    assert sum(request.startswith("GET /cdn/") for request in hub.requests) > 1


def test_a_missing_file_is_not_retried(hub: Hub, repository: Repository, target: Path) -> None:
    hub.fail("missing")
    with pytest.raises(WeightsError, match="lists a file that it does not have"):
        get(repository, target)
    assert sum("resolve" in request for request in hub.requests) == 1


@pytest.mark.parametrize("status", [403, 404, 416])
def test_other_client_errors_are_not_retried(hub: Hub, repository: Repository, target: Path, status: int) -> None:
    hub.fail("status", "/cdn/*", status=status)
    with pytest.raises(WeightsError, match=str(status)) as raised:
        get(repository, target)
    assert "signature" not in raised.value.message
    assert sum("/cdn/" in request for request in hub.requests) == 1


def test_a_response_of_the_wrong_size(hub: Hub, repository: Repository, target: Path) -> None:
    hub.fail("wrong_size", after_bytes=10)
    with pytest.raises(WeightsError, match="is not that file"):
        get(repository, target)


@pytest.mark.parametrize("name", [NAME, SMALL])
def test_a_corrupt_file_is_downloaded_again(
    hub: Hub, repository: Repository, model: Path, target: Path, name: str
) -> None:
    hub.fail("corrupt", after_bytes=100, times=1)
    progress = get(repository, target, name)
    size = (model / name).stat().st_size
    assert -size in progress
    assert sum(progress) == size
    assert_downloaded(target, model, name)
    assert hub.sent_bytes == 2 * size


@pytest.mark.parametrize("name", [NAME, SMALL])
def test_a_file_that_is_corrupt_twice_is_an_error(hub: Hub, repository: Repository, target: Path, name: str) -> None:
    hub.fail("corrupt", after_bytes=100)
    progress: list[int] = []
    file = repository.file(name)
    with pytest.raises(WeightsError, match=f"`{name}` of `owner/model` is corrupt") as raised:
        fetch_file(repository, file, target, progress.append)
    assert str(file.sha256 or file.blob_id) in raised.value.message
    assert sum(progress) == 0
    assert list(target.parent.iterdir()) == []


def test_the_token_stays_with_the_hub(
    hub: Hub, repository: Repository, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    get(repository, target)
    assert any("resolve" in request for request in hub.authorized)
    assert not any("cdn" in request for request in hub.authorized)


def test_a_full_disk(
    repository: Repository, model: Path, target: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = fetch._write_all  # pyright: ignore[reportPrivateUsage]

    def write_until_full(stream: FileIO, data: bytes) -> None:
        if stream.tell() + len(data) > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(stream, data)

    with monkeypatch.context() as full:
        full.setattr(fetch, "_write_all", write_until_full)
        with pytest.raises(WeightsError, match=r"disk is full: .*target` cannot be written; 2\d\d\.\d kB") as raised:
            get(repository, target)
    assert raised.value.hint is not None
    assert "HF_HOME" in raised.value.hint
    kept = partial_file.part_path(target).stat().st_size
    assert 0 < kept <= 100_000
    hub.reset_counts()
    get(repository, target)
    assert_downloaded(target, model)
    assert SIZE - kept <= hub.sent_bytes < SIZE  # the hub may still have sent a rest of the first response


def test_a_folder_that_cannot_be_created(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="cannot be written") as raised:
        get(repository, tmp_path / "file" / "target")
    assert raised.value.hint is not None
    assert "permissions" in raised.value.hint


def test_concurrent_downloads_fetch_the_file_once(hub: Hub, repository: Repository, model: Path, target: Path) -> None:
    hub.fail("slow", "/cdn/*", bytes_per_s=1_500_000)
    progress: list[list[int]] = []
    threads = [threading.Thread(target=lambda: progress.append(get(repository, target))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_downloaded(target, model)
    assert hub.sent_bytes == SIZE
    assert [sum(deltas) for deltas in progress] == [SIZE] * 3


def test_a_lock_held_by_an_idle_process(repository: Repository, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_file, "MAX_LOCK_WAIT_S", 0.1)
    target.parent.mkdir()
    never = threading.Event()
    with (
        partial_file.lock_partial_file(target, partial_file.ProgressMeter(partial_file.ignore_progress), never),
        pytest.raises(WeightsError, match="is locked by another process"),
    ):
        get(repository, target)


@pytest.mark.parametrize("is_waiting", [False, True], ids=["receiving", "between attempts"])
def test_cancel_stops_quickly(
    hub: Hub,
    repository: Repository,
    weights: RepositoryFile,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_waiting: bool,
) -> None:
    if is_waiting:
        monkeypatch.setattr(retries, "FIRST_DELAY_S", 100.0)
        monkeypatch.setattr(retries, "MAX_WAIT_S", 1000.0)
        hub.fail("drop")
    else:
        hub.fail("slow", bytes_per_s=20_000)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    started_s = time.monotonic()
    with pytest.raises(Cancelled):
        fetch_file(repository, weights, target, stop=stop)
    assert time.monotonic() - started_s < 10


@pytest.mark.parametrize(
    ("headers", "delay_s"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "4000"}, 3600),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=9;t=55'}, 0.001),
        ({"Retry-After": "soon"}, 0.001),
        ({}, 0.001),
    ],
)
def test_the_hub_can_set_the_delay(
    hub: Hub,
    repository: Repository,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str],
    delay_s: float,
) -> None:
    waits_s: list[float] = []
    monkeypatch.setattr(retries, "MAX_WAIT_S", 10_000.0)

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits_s.append(timeout or 0.0)
            return False

    hub.fail("status", status=429, times=1, headers=headers)
    fetch_file(repository, repository.file(SMALL), target, stop=Stop())
    assert delay_s / 2 <= sum(waits_s) <= delay_s


def test_delays_grow_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 1.0)
    delays_s = [retries._delay_s(retries.IncompleteResponse(), failures) for failures in range(1, 9)]  # pyright: ignore[reportPrivateUsage]
    assert all(low / 2 <= delay <= low for delay, low in zip(delays_s, [1, 2, 4, 8, 16, 32, 60, 60], strict=True))


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (100_000, 200_000), (SIZE - 1, SIZE), (0, SIZE), (5, 5)])
@pytest.mark.parametrize("fault", ["", "drop", "ignore_range"])
def test_a_range(hub: Hub, repository: Repository, model: Path, start: int, stop: int, fault: Any) -> None:
    if fault:
        hub.fail(fault, after_bytes=min(20_000, (stop - start) // 2), times=3)
    assert read_range(repository, NAME, start, stop) == (model / NAME).read_bytes()[start:stop]
    if not fault:
        assert hub.sent_bytes == stop - start


@pytest.mark.parametrize(("start", "stop"), [(0, SIZE + 1), (-1, 5), (6, 5)])
def test_a_range_beyond_the_file(repository: Repository, start: int, stop: int) -> None:
    with pytest.raises(WeightsError, match="has 300000 bytes"):
        read_range(repository, NAME, start, stop)


def test_a_truncated_range(hub: Hub, repository: Repository) -> None:
    hub.fail("wrong_size", after_bytes=1000)
    with pytest.raises(WeightsError, match="is not that file"):
        read_range(repository, NAME, 500, 2000)


@pytest.fixture
def xet_get(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace hf-xet, which needs its own servers; returns the written paths."""
    written: list[Path] = []

    def get(*, incomplete_path: Path, xet_file_data: Any, tqdm_class: Any, **others: Any) -> None:
        data = (model / NAME).read_bytes()
        assert xet_file_data.file_hash == look_up("owner/model").file(NAME).sha256
        with tqdm_class(total=len(data)) as bar:
            bar.update(len(data) // 2)
            bar.update(len(data) - len(data) // 2)
        written.append(incomplete_path)
        incomplete_path.write_bytes(data)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("huggingface_hub.file_download.xet_get", get)
    monkeypatch.setattr(xet.importlib.util, "find_spec", lambda name: name)
    hub.xet = "*.safetensors"
    return written


def test_xet_is_used_if_possible(hub: Hub, repository: Repository, model: Path, target: Path, xet_get: Any) -> None:
    assert sum(get(repository, target)) == SIZE
    assert_downloaded(target, model)
    assert xet_get == [partial_file.xet_part_path(target)]
    assert hub.sent_bytes == 0


def test_xet_is_not_used_for_partial_files_or_other_storage(
    hub: Hub, repository: Repository, target: Path, xet_get: Any
) -> None:
    target.parent.mkdir()
    partial_file.part_path(target).write_bytes(b"?")
    get(repository, target)
    get(repository, target.with_name("tokens"), "tiktoken.model")
    assert xet_get == []


@pytest.mark.parametrize("error", [RuntimeError("CAS"), None], ids=["error", "wrong bytes"])
def test_plain_http_is_used_if_xet_fails(
    hub: Hub,
    repository: Repository,
    model: Path,
    target: Path,
    xet_get: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
) -> None:
    def get_badly(*, incomplete_path: Path, tqdm_class: Any, **others: Any) -> None:
        tqdm_class().update(7)
        incomplete_path.write_bytes(bytes(SIZE))
        if error:
            raise error

    monkeypatch.setattr("huggingface_hub.file_download.xet_get", get_badly)
    assert sum(get(repository, target)) == SIZE
    assert_downloaded(target, model)
    assert hub.sent_bytes == SIZE
