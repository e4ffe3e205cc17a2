"""Run the checks, each in a process of its own, so that a crash or a hang of one does not end the others.

Does not import MLX.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import IO, Any, Literal

from kimi_mlx.errors import KimiMlxError, UsageError
from kimi_mlx.gpu_check.checks import CHECKS, Check, CheckResult, Comparison, Device, Measurement

SizesName = Literal["full", "small"]

DESCRIBE_LIMIT_S = 60.0
END_LIMIT_S = 15.0
"""Time that a process gets to end by itself: killing one that holds wired memory can lose that memory."""

ENVIRONMENT = {"MLX_ENABLE_TF32": "0"}
"""Turns TF32 off: on an M5 or on CUDA, MLX's float32 matrix products would round their inputs to 10 bits."""

INSTALL_HINT = (
    "on a Mac, use a Python for arm64; on Linux with an NVIDIA GPU, run `pip uninstall mlx-cpu`, then "
    "`pip install 'mlx[cuda13]'`"
)


def describe(device: Device) -> dict[str, Any]:
    """Return the device and the versions.

    Raises:
        UsageError: MLX has no such device here.
        KimiMlxError: MLX does not start.
    """
    description: dict[str, Any] = {}
    result = CheckResult(Check("describe", "device", DESCRIBE_LIMIT_S))
    with _child("describe", device, "full") as (process, messages, errors):
        for message in _messages_of(messages, DESCRIBE_LIMIT_S):
            description = message["device"]
        _finish(result, process, errors, is_done=bool(description))
    if result.state != "ok":
        raise KimiMlxError(f"MLX does not start: {result.message}", hint="run `kimi-mlx doctor`")
    if not description["has_device"]:
        raise UsageError(f"MLX {description['versions']['mlx']} has no GPU on this machine", hint=INSTALL_HINT)
    return description


def run_checks(
    device: Device,
    sizes: SizesName,
    on_progress: Callable[[Check, str], None] = lambda check, text: None,
    checks: Sequence[Check] = CHECKS,
) -> Generator[CheckResult]:
    """Run the checks one after the other and yield the result of each. Closing the iterator ends the current one."""
    for check in checks:
        yield run_check(check, device, sizes, on_progress)


def run_check(
    check: Check, device: Device, sizes: SizesName, on_progress: Callable[[Check, str], None] = lambda check, text: None
) -> CheckResult:
    """Run one check in a new process. An error of the check is part of the result."""
    result = CheckResult(check)
    started, last, is_done = time.monotonic(), "start", False
    on_progress(check, last)
    with _child(check.name, device, sizes) as (process, messages, errors):
        try:
            for message in _messages_of(messages, check.limit_s):
                kind = message.pop("kind")
                if kind == "comparison":
                    result.comparisons.append(Comparison(**message))
                elif kind == "measurement":
                    result.measurements.append(Measurement(**message))
                elif kind == "skipped":
                    result.state, result.message = "skipped", message["text"]
                elif kind == "progress":
                    last = message["text"]
                    on_progress(check, last)
                is_done = kind == "done"
            _finish(result, process, errors, is_done)
        except TimeoutError:
            result.state, result.message = "timeout", f"not finished after {check.limit_s:.0f} s, at: {last}"
    if result.state == "ok" and not all(comparison.is_ok for comparison in result.comparisons):
        result.state = "failed"
    result.seconds = time.monotonic() - started
    return result


@contextlib.contextmanager
def _child(name: str, device: Device, sizes: SizesName) -> Iterator[tuple[subprocess.Popen[bytes], Any, IO[bytes]]]:
    """Start a check's process; end it and its children at the end of the block."""
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "kimi_mlx.gpu_check.child", name, device, sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT},
        )
        reader = threading.Thread(target=_read, args=(process, messages), daemon=True)
        reader.start()
        try:
            yield process, messages, errors
        finally:
            _end(process)


def _read(process: subprocess.Popen[bytes], messages: queue.SimpleQueue[bytes | None]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            messages.put(line)
    messages.put(None)


def _messages_of(messages: queue.SimpleQueue[bytes | None], limit_s: float) -> Iterator[dict[str, Any]]:
    """Yield messages until the process closes its output.

    Raises:
        TimeoutError: the process has not closed its output within the limit.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            line = messages.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        yield json.loads(line)


def _finish(result: CheckResult, process: subprocess.Popen[bytes], errors: IO[bytes], is_done: bool) -> None:
    """Wait for a process that has closed its output; set the error of the result if the check is not done."""
    try:
        code = process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        result.state, result.message = "timeout", f"its process did not end within {END_LIMIT_S:.0f} s"
        return
    if code == 0 and is_done:
        return
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    result.state, result.message = "error", "; ".join([reason, *lines[-1:]])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children: SIGTERM first, then SIGKILL."""
    for number, limit_s in ((signal.SIGTERM, END_LIMIT_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(limit_s)
            break
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(BrokenPipeError):
        if process.stdin is not None:
            process.stdin.close()
