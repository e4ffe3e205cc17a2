"""The guard ends its child when standard input ends or stays silent, and removes the child's files."""

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
from kimi_mlx.cluster.channel.messages import Message, decode, decode_error
from kimi_mlx.cluster.ring.cleanup import end_leftovers
from kimi_mlx.cluster.ring.guard import guard_command
from kimi_mlx.temporary import LOCK_NAME
from tests.unit.cluster.hosts.test_ssh import is_running

CHILD = """
import os, sys, tempfile, time
def main():
    open(os.path.join(tempfile.gettempdir(), "leftover file"), "w").close()
    print(os.getpid(), tempfile.gettempdir(), sys.stdin.readline().strip(), flush=True)
    if sys.stdin.readline():
        sys.exit(3)
    time.sleep(100)  # does not notice that its input has ended
"""


RELEASING_CHILD = """
import os, socket, sys, tempfile, time
def main():
    guard = socket.socket(fileno=int(os.environ["KIMI_MLX_GUARD"]))
    guard.send(b"5.0\\n")
    print(os.getpid(), tempfile.gettempdir(), sys.stdin.readline().strip(), flush=True)
    assert sys.stdin.readline() == ""
    guard.send(b"0.2\\n")
    time.sleep(DELAY)
    sys.exit(7)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "guarded_child.py").write_text(CHILD)
    root = Path(__file__).parents[4]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return "guarded_child"


@contextmanager
def guarded(
    module: str, silence_s: float | None = None, tag: str = "tag123"
) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """Start a guarded child; yield the guard, the child's process id and its temporary folder."""
    command = guard_command(module, sys.executable, tag, silence_s)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        write_line(process, "hello")
        assert process.stdout is not None
        pid, folder, line = process.stdout.readline().split()
        assert line == "hello"
        yield process, int(pid), Path(folder)


def write_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def test_guard_returns_the_exit_code_of_its_child(child: str) -> None:
    with guarded(child) as (process, _, folder):
        write_line(process, "more")
        assert (process.wait(10), folder.exists()) == (3, False)


def test_guard_exits_when_its_input_ends(child: str) -> None:
    with guarded(child) as (process, pid, folder):
        begin = time.monotonic()
        process.communicate(timeout=50)
        assert time.monotonic() - begin < 20
        assert (process.returncode, is_running(pid), folder.exists()) == (128 + signal.SIGTERM, False, False)


def test_guard_exits_when_its_input_is_silent(child: str) -> None:
    with guarded(child, 0.5) as (process, pid, folder):
        process.wait(10)
        assert (is_running(pid), folder.exists()) == (False, False)
        assert process.stderr is not None
        assert "received nothing from the front for" in process.stderr.read()


def test_stopped_child_does_not_block_the_guard(child: str) -> None:
    with guarded(child) as (process, pid, folder):
        os.kill(pid, signal.SIGSTOP)
        write_line(process, "x" * (1 << 20))  # more than a pipe holds
        process.communicate(timeout=10)
        assert (is_running(pid), folder.exists()) == (False, False)


def test_sweep_removes_leftovers_of_a_killed_guard(child: str, tmp_path: Path) -> None:
    with guarded(child) as (process, pid, folder):
        os.kill(pid, signal.SIGSTOP)
        process.kill()
        process.wait(10)
        assert (is_running(pid), folder.exists()) == (True, True)
        left = end_leftovers(["localhost"], "tag123", 5)
        assert (left.unconfirmed_hosts, left.num_killed) == ([], {})
        assert (is_running(pid), folder.exists()) == (False, False)


def test_guard_removes_folders_of_guards_that_are_gone(child: str, tmp_path: Path) -> None:
    stale = [tmp_path / f"kimi-mlx-{'a' * 16}-{name}" for name in "xy"]
    for folder in stale:
        folder.mkdir()
        (folder / LOCK_NAME).touch()  # not locked, as after a power failure
    with guarded(child, tag="b" * 16) as (_, _, running), guarded(child, tag="c" * 16):
        assert running.exists()
        assert not any(folder.exists() for folder in stale)


@pytest.mark.parametrize(("delay_s", "code"), [(0.0, 7), (100.0, 128 + signal.SIGTERM)])
def test_a_child_gets_the_time_that_it_says_it_needs(child: str, tmp_path: Path, delay_s: float, code: int) -> None:
    (tmp_path / "releasing_child.py").write_text(RELEASING_CHILD.replace("DELAY", str(delay_s)))
    with guarded("releasing_child") as (process, pid, folder):
        process.communicate(timeout=20)
        assert (process.returncode, is_running(pid), folder.exists()) == (code, False, False)


def test_guard_exits_on_sigterm(child: str) -> None:
    with guarded(child) as (process, pid, folder):
        process.terminate()
        process.wait(10)
        assert (is_running(pid), folder.exists()) == (False, False)


def test_output_of_the_login_shell_is_skipped() -> None:
    inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    script = """printf '{"kind": "wrong"}\\nWelcome!'; echo complaint >&2; printf '\\nmark\\n'; printf '\\nmark\\n' >&2
        echo late; printf partial; read -r line
        echo "mark: {\\"kind\\": \\"$line\\"}"
        echo '{"kind": "wrong"}'; echo mark: x"""
    process = HostProcess(
        0, ["sh", "-c", script], os.environ, lambda _, message: inbox.put(message), b"hello\n", b"mark"
    )
    assert inbox.get(timeout=5) == {"kind": "hello"}
    assert inbox.get(timeout=5) == {"kind": "failed", "text": "sent a line that is not a message: b'x\\n'"}
    assert inbox.get(timeout=5) is None
    assert process.has_started
    terminate_all([process], 1)


def test_job_that_keeps_the_output_open_does_not_delay_the_end() -> None:
    inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    script = """printf '\\nmark\\n'; sleep 60 & echo 'mark: {"kind": "exited", "code": 3}'; wait"""
    process = HostProcess(0, ["sh", "-c", script], os.environ, lambda _, message: inbox.put(message), b"", b"mark")
    assert inbox.get(timeout=20) is None
    assert process.wait(0)
    assert (process.exit_code, process.has_confirmed_exit) == (3, True)
    os.killpg(process.pid, signal.SIGKILL)
    terminate_all([process], 1)


def test_output_of_the_login_shell_is_kept_if_nothing_follows() -> None:
    inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    script = "echo 'not available'; exit 1"
    process = HostProcess(0, ["sh", "-c", script], os.environ, lambda _, message: inbox.put(message), b"", b"mark")
    assert inbox.get(timeout=5) is None
    assert process.describe_exit() == "exited with code 1; its last lines:\n  not available"
    assert not process.has_started
    terminate_all([process], 1)


def test_no_folder_for_temporary_files_is_one_error(child: str, tmp_path: Path) -> None:
    code = f"import tempfile; tempfile._candidate_tempdir_list = lambda: ['{tmp_path}/missing']; "
    command = guard_command(child, sys.executable, "tag123", None)
    command[3] = code + command[3]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20)
    error = decode_error(decode(done.stdout.encode()))
    assert (done.returncode, done.stderr) == (1, "")
    assert "cannot write temporary files: No usable temporary directory found" in error.message
    assert "--env TMPDIR=/path" in (error.hint or "")
