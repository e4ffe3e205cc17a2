"""Servers of this user on this machine."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.client.local_servers import LocalServer, announce, find_servers, is_answering, servers_folder

SERVER = LocalServer("http://127.0.0.1:8080", "kimi-k2", "owner/name", 10**12, ("mac-a",), True, 1234, 1000.0)

KILLED = """
import os, signal
from kimi_mlx.client.local_servers import LocalServer, announce
with announce(LocalServer("http://127.0.0.1:8080", "kimi-k2", "owner/name", 10**12, (), False, os.getpid(), 1.0)):
    print("up", flush=True)
    signal.pause()
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = servers_folder()
    assert folder is not None
    return folder


def test_a_server_is_found_while_it_runs(folder: Path) -> None:
    assert find_servers() == []
    with announce(SERVER), announce(replace(SERVER, pid=5678, started_at=2000.0)):
        assert [server.pid for server in find_servers()] == [5678, 1234]
        assert find_servers()[1] == SERVER
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == []


def test_files_of_killed_servers_are_removed(folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, env={**os.environ})
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [server.pid for server in find_servers()] == [process.pid]
        process.kill()
    assert find_servers() == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"url": 1}', json.dumps({"hosts": None})])
def test_broken_files_are_ignored(folder: Path, content: str) -> None:
    with announce(SERVER):
        (folder / "1234.json").write_text(content)
        assert find_servers() == []


def test_a_folder_that_cannot_be_written_is_no_obstacle(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file")
    with announce(SERVER):
        assert find_servers() == []


def test_no_server_answers_at_a_free_port() -> None:
    start = time.monotonic()
    assert not is_answering(replace(SERVER, url="http://127.0.0.1:9"))
    assert time.monotonic() - start < 10
