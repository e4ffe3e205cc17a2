"""A process that does not outlive whoever started it: runs a module of ours and hands its input on.

MLX's ring holds Python's lock while it connects, so that a rank cannot watch its own input then. The child is killed
when the input ends (the front is gone, or the ssh session that it came through) or falls silent (the network is gone,
too: the front says a word every second); what it has put into TMPDIR goes with it.
"""

from __future__ import annotations

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

from kimi_mlx.cluster.hosts.launch import rank_command

POLL_INTERVAL_S = 0.1
"""How soon the end of the child is noticed."""

FOLDER_PREFIX = "kimi-mlx-"
"""Of the folder for temporary files, before the tag."""


def guard_command(module: str, python: str, tag: str, silence_s: float | None) -> list[str]:
    """The command that runs `main` of a module under guard.

    Args:
        module: of kimi_mlx.
        python: the interpreter.
        tag: by which the processes and their folder are found, should they be left over.
        silence_s: of the input, after which nothing is left of it; None for a front that cannot fall silent unended.
    """
    return [*rank_command(__name__, python), module, tag, str(silence_s or 0)]


def main() -> None:
    """Run the module; the exit code is its own, 128 and its number after a signal, 1 if it was ended by us."""
    module, tag, silence_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _leave)
    _tidy()
    prefix = f"{FOLDER_PREFIX}{tag}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "TMPDIR": folder}
        child = subprocess.Popen([*rank_command(module), tag], stdin=subprocess.PIPE, env=environment)
        try:
            code = _watch(child, silence_s)
        finally:
            child.kill()
            child.wait()
    sys.exit(code if code >= 0 else 128 - code)


def _watch(child: subprocess.Popen[bytes], silence_s: float) -> int:
    """Hand on what comes in until the child has ended, the input has, or it has been silent for too long."""
    assert child.stdin is not None
    pipe, heard = child.stdin.fileno(), time.monotonic()
    os.set_blocking(pipe, False)  # a child that is stopped must not stop us
    pending = bytearray()
    while (code := child.poll()) is None:
        if silence_s and time.monotonic() - heard > silence_s:
            print(f"nothing was heard for {silence_s:.0f} s of who started this", file=sys.stderr)
            return 1
        readable, writable, _ = select.select([0], [pipe] if pending else [], [], POLL_INTERVAL_S)
        if readable:
            data = os.read(0, 1 << 16)
            if not data:
                return 1
            pending += data
            heard = time.monotonic()
        if writable:
            try:
                del pending[: os.write(pipe, pending)]
            except BrokenPipeError:  # it is ending
                time.sleep(POLL_INTERVAL_S)
    return code


def _tidy() -> None:
    """Remove folders of guards that are gone, such as after a power cut."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}{'[0-9a-f]' * 16}-*-*"):
        try:
            os.kill(int(folder.name.split("-")[3]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, OSError):  # not one of ours, or of another user
            continue


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
