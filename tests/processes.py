"""Processes that end with the test that starts them, also where it fails: else they would disturb the next ones."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

_started: list[subprocess.Popen[Any]] = []


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a process without input, with pipes for what it says; `options` of Popen replace that."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **{**pipes, **options})
    _started.append(process)
    return process


def end_all() -> None:
    """Kill what still runs, and close all pipes."""
    while _started:
        with _started.pop() as process:
            process.kill()
