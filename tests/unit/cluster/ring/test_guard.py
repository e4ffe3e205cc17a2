"""A guarded process ends with its input, and when it hears nothing; its files go with it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kimi_mlx.cluster.channel.host_process import HostProcess, terminate_all
from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.cluster.ring.cleanup import kill_leftovers
from kimi_mlx.cluster.ring.guard import guard_command
from tests.unit.cluster.hosts.test_ssh import is_running

CHILD = """
import os, sys, tempfile, time
def main():
    open(os.path.join(tempfile.gettempdir(), "left over"), "w").close()
    print(os.getpid(), tempfile.gettempdir(), sys.stdin.readline().strip(), flush=True)
    if sys.stdin.readline():
        sys.exit(3)
    time.sleep(100)  # its input has ended, which it does not notice
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "guarded_child.py").write_text(CHILD)
    root = Path(__file__).parents[4]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return "guarded_child"


@contextmanager
def guarded(module: str, silence_s: float | None = None) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """The guard, the child's process id, and its folder for temporary files."""
    command = guard_command(module, sys.executable, "tag123", silence_s)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        tell(process, "hello")
        assert process.stdout is not None
        pid, folder, word = process.stdout.readline().split()
        assert word == "hello"
        yield process, int(pid), Path(folder)


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def test_the_exit_code_is_the_childs(child: str) -> None:
    with guarded(child) as (process, _, folder):
        tell(process, "more")
        assert (process.wait(10), folder.exists()) == (3, False)


def test_it_ends_with_its_input(child: str) -> None:
    with guarded(child) as (process, pid, folder):
        begin = time.monotonic()
        process.communicate(timeout=50)
        assert time.monotonic() - begin < 20
        assert (process.returncode, is_running(pid), folder.exists()) == (1, False, False)


def test_it_ends_when_it_hears_nothing(child: str) -> None:
    with guarded(child, 0.5) as (process, pid, folder):
        process.wait(10)
        assert (is_running(pid), folder.exists()) == (False, False)
        assert process.stderr is not None
        assert "received nothing from the front for" in process.stderr.read()


def test_a_child_that_is_stopped_does_not_stop_the_guard(child: str) -> None:
    with guarded(child) as (process, pid, folder):
        os.kill(pid, signal.SIGSTOP)
        tell(process, "x" * (1 << 20))  # more than a pipe holds
        process.communicate(timeout=10)
        assert (is_running(pid), folder.exists()) == (False, False)


def test_what_a_killed_guard_leaves_is_swept(child: str, tmp_path: Path) -> None:
    with guarded(child) as (process, pid, folder):
        os.kill(pid, signal.SIGSTOP)
        process.kill()
        process.wait(10)
        assert (is_running(pid), folder.exists()) == (True, True)
        assert kill_leftovers(["localhost"], "tag123") == []
        assert (is_running(pid), folder.exists()) == (False, False)


def test_it_ends_when_it_is_told_to(child: str) -> None:
    with guarded(child) as (process, pid, folder):
        process.terminate()
        process.wait(10)
        assert (is_running(pid), folder.exists()) == (False, False)


def test_a_shell_may_greet_before_the_first_message() -> None:
    inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    script = 'echo Welcome!; read -r line; echo "{\\"kind\\": \\"$line\\"}"; echo noise'
    process = HostProcess(0, ["sh", "-c", script], os.environ, lambda _, message: inbox.put(message), b"hello\n")
    assert inbox.get(timeout=5) == {"kind": "hello"}
    assert inbox.get(timeout=5) is None  # noise later is none of it
    terminate_all([process], 1)
