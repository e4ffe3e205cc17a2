"""A process that does not outlive whoever started it: runs a module of ours and hands its input on.

MLX's ring holds Python's lock while it connects, so that a rank cannot watch its own input then. The child is killed
when the input ends (the front is gone, or the ssh session that it came through) and when the time is over; what it
has put into TMPDIR goes with it.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from types import FrameType

from kimi_mlx.cluster.launch import rank_command

LOOK_EVERY_S = 0.1
"""How soon the end of the child is noticed."""


def guard_command(module: str, python: str, limit_s: float) -> list[str]:
    """The command that runs `main` of a module under guard.

    Args:
        module: of kimi_mlx.
        python: the interpreter.
        limit_s: after which nothing is left of it.
    """
    return [*rank_command(__name__, python), module, str(limit_s)]


def main() -> None:
    """Run the module; the exit code is its own, 1 if it was killed."""
    module, limit_s = sys.argv[1], float(sys.argv[2])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _leave)
    with tempfile.TemporaryDirectory(prefix="kimi-mlx-guard-") as folder:
        environment = {**os.environ, "TMPDIR": folder}
        child = subprocess.Popen(rank_command(module), stdin=subprocess.PIPE, env=environment)
        try:
            code = _watch(child, limit_s)
        finally:
            child.kill()
            child.wait()
    if code < 0:
        print(f"ended by {signal.Signals(-code).name}", file=sys.stderr)
    sys.exit(code if code >= 0 else 128 - code)


def _watch(child: subprocess.Popen[bytes], limit_s: float) -> int:
    """Hand on what comes in until the child has ended, the input has, or the time is over."""
    assert child.stdin is not None
    pipe, end = child.stdin.fileno(), time.monotonic() + limit_s
    while (code := child.poll()) is None:
        if time.monotonic() > end:
            print(f"ended after {limit_s:.0f} s, the limit", file=sys.stderr)
            return 1
        if not select.select([0], [], [], LOOK_EVERY_S)[0]:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            return 1
        try:
            os.write(pipe, data)
        except BrokenPipeError:  # it is ending
            time.sleep(LOOK_EVERY_S)
    return code


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
