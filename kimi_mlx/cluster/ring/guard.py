"""A guard: run a rank's module as a child process, forward its input, and end it when the front is gone.

MLX's ring holds Python's lock while it connects, so a rank cannot watch its own input then. The guard kills the child
when its input ends (the front or its ssh session is gone) or stops (the network is gone: the front sends a message
every second), and removes the child's temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from kimi_mlx.cluster.channel.messages import encode_error
from kimi_mlx.cluster.hosts.launch import rank_command
from kimi_mlx.errors import RingError

POLL_INTERVAL_S = 0.1
"""Interval at which the end of the child is checked."""

FOLDER_PREFIX = "kimi-mlx-"
"""Prefix of the temporary folder; the tag follows."""


def guard_command(module: str, python: str, tag: str, silence_s: float | None) -> list[str]:
    """Return the command that runs `main` of a module under a guard.

    Args:
        module: dotted name of the module.
        python: path of the interpreter.
        tag: token that marks the processes and their folder, so that leftovers can be found.
        silence_s: seconds without input after which the child is killed; None for no limit (a front on this host).
    """
    return [*rank_command(__name__, python), module, tag, str(silence_s or 0)]


def main() -> None:
    """Run the module. The exit code is the child's, 128 plus the number of a signal, or 1 if the guard killed it."""
    module, tag, silence_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _exit_on_signal)
    with contextlib.suppress(OSError):  # no folder can be written
        _remove_stale_folders()
    with _make_folder(f"{FOLDER_PREFIX}{tag}-{os.getpid()}-") as folder:
        environment = {**os.environ, "TMPDIR": folder}
        child = subprocess.Popen([*rank_command(module), tag], stdin=subprocess.PIPE, env=environment)
        try:
            code = _watch(child, silence_s)
        finally:
            child.kill()
            child.wait()
    sys.exit(code if code >= 0 else 128 - code)


def _make_folder(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """Create the child's temporary folder; if no folder can be written, report that as the rank's error and exit."""
    try:
        return tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    except OSError as error:
        sys.stdout.buffer.write(encode_error(no_temporary_files(error), rank=None))
        sys.exit(1)


def no_temporary_files(error: OSError) -> RingError:
    """Return the error for a host on which a rank cannot write its temporary files."""
    return RingError(
        f"`{os.uname().nodename}` cannot write temporary files: {error.strerror or error}",
        hint="free disk space there, or use another folder: `kimi-mlx launch --env TMPDIR=/path ...`",
    )


def _watch(child: subprocess.Popen[bytes], silence_s: float) -> int:
    """Forward input until the child ends, the input ends, or nothing arrives for too long."""
    assert child.stdin is not None
    pipe, received_at = child.stdin.fileno(), time.monotonic()
    os.set_blocking(pipe, False)  # a child that is stopped must not stop us
    pending = bytearray()
    while (code := child.poll()) is None:
        if silence_s and time.monotonic() - received_at > silence_s:
            print(f"received nothing from the front for {silence_s:.0f} s", file=sys.stderr)
            return 1
        readable, writable, _ = select.select([0], [pipe] if pending else [], [], POLL_INTERVAL_S)
        if readable:
            data = os.read(0, 1 << 16)
            if not data:
                return 1
            pending += data
            received_at = time.monotonic()
        if writable:
            try:
                del pending[: os.write(pipe, pending)]
            except BrokenPipeError:  # the child is ending
                time.sleep(POLL_INTERVAL_S)
    return code


def _remove_stale_folders() -> None:
    """Remove the folders of guards that are gone, for example after a power cut."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}{'[0-9a-f]' * 16}-*-*"):
        tag, pid = folder.name.split("-")[2:4]
        if not _is_guard_running(tag, pid):
            shutil.rmtree(folder, ignore_errors=True)


def _is_guard_running(tag: str, pid: str) -> bool:
    """Return whether a process is the guard with this tag; after a restart of the host, another may have its id."""
    try:
        done = subprocess.run(["ps", "-ww", "-o", "args=", "-p", pid], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return True  # unknown
    return tag in done.stdout


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
