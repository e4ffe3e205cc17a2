"""Processes that are killed at the end of the test that starts them, even if it fails."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

_started: list[subprocess.Popen[Any]] = []


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a process without input and with pipes for its output. `options` are passed to Popen."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **{**pipes, **options})
    _started.append(process)
    return process


def end_all() -> None:
    """Kill running processes and close all pipes."""
    while _started:
        with _started.pop() as process:
            process.kill()
