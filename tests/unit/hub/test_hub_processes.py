"""Downloads in separate processes that are killed, interrupted or offline."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kimi_mlx.weights.index import INDEX_NAME
from tests.hub import SEND_BUFFER_BYTES, Hub, environment

pytestmark = pytest.mark.slow

SIZE = 4_000_000
FETCH = """
from kimi_mlx.hub import client, retries
retries.FIRST_DELAY_S = 0.01
print(client.find_local("owner/model") or client.fetch_checkpoint(client.look_up("owner/model")))
"""
SNAPSHOT = """
from huggingface_hub import snapshot_download
print(snapshot_download("owner/model", local_files_only=True))
"""


@pytest.fixture
def weights(model: Path) -> Path:
    """One large file instead of three."""
    for path in [*model.glob("*.safetensors"), model / INDEX_NAME]:
        path.unlink()
    shutil.rmtree(model / "figures")
    file = model / "model.safetensors"
    file.write_bytes(random.Random(0).randbytes(SIZE))
    return file


@pytest.fixture
def hub(weights: Path) -> Iterator[Hub]:
    with Hub({"owner/model": weights.parent}) as hub:
        yield hub


@pytest.fixture
def start(hub: Hub, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python code that uses the hub."""
    processes: list[subprocess.Popen[str]] = []

    def start(code: str, **variables: str) -> subprocess.Popen[str]:
        variables = {**os.environ, **environment(hub, tmp_path / "home"), **variables}
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=pipe, stderr=pipe, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> Path:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return Path(out.strip())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_resume_after_several_kills(
    hub: Hub, weights: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    hub.fail("slow", "/cdn/*model.safetensors", bytes_per_s=4_000_000)
    kills = 3
    for kill in range(kills):
        process = start(FETCH)
        wait_for(lambda so_far=(kill + 1) * SIZE // 5: hub.sent_bytes >= so_far)
        process.kill()
        process.communicate()
    hub.clear_faults()
    folder = finish(start(FETCH))
    assert (folder / "model.safetensors").read_bytes() == weights.read_bytes()
    assert not list(tmp_path.rglob("*.part"))
    lost_bytes = hub.sent["owner/model/model.safetensors"] - SIZE
    # a kill loses the data in the socket buffers (Linux doubles the requested size) and one chunk
    assert 0 <= lost_bytes <= kills * (4 * SEND_BUFFER_BYTES + 200_000)
    hub.reset_counts()
    assert finish(start(FETCH)) == folder
    assert hub.requests == []
    assert finish(start(SNAPSHOT)) == folder


def test_ctrl_c_ends_quickly_and_the_next_run_resumes(
    hub: Hub, weights: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    hub.fail("stall", "/cdn/*model.safetensors", after_bytes=1_000_000, times=1)
    process = start(FETCH, HF_HUB_DOWNLOAD_TIMEOUT="60")
    wait_for(lambda: any(part.stat().st_size == 1_000_000 for part in tmp_path.rglob("*.part")))
    started_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=50)
    assert time.monotonic() - started_s < 20
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    hub.clear_faults()
    folder = finish(start(FETCH))
    assert (folder / "model.safetensors").read_bytes() == weights.read_bytes()
    assert hub.sent["owner/model/model.safetensors"] == SIZE


def test_two_processes_fetch_it_once(hub: Hub, start: Callable[..., subprocess.Popen[str]]) -> None:
    hub.fail("slow", "/cdn/*model.safetensors", bytes_per_s=4_000_000)
    folders = {finish(process) for process in [start(FETCH), start(FETCH)]}
    assert len(folders) == 1
    assert hub.sent["owner/model/model.safetensors"] == SIZE


def test_offline(hub: Hub, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(FETCH, HF_HUB_OFFLINE="1")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "`HF_HUB_OFFLINE` forbids it" in err
    folder = finish(start(FETCH))
    hub.reset_counts()
    assert finish(start(FETCH, HF_HUB_OFFLINE="1")) == folder
    assert hub.requests == []
