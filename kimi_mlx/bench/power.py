"""What this Mac draws, from macOS' `powermetrics`, which only root may ask. Not yet seen on hardware.

It estimates the power of processor, GPU and neural engine; memory, fans and what the supply loses are not in it, and
Apple warns against comparing different Macs by it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

INTERVAL_MS = 200

END_PATIENCE_S = 2.0

_ELAPSED = re.compile(r"\*\*\* Sampled system activity .*\(([\d.]+)ms elapsed\)")
_POWER = re.compile(r"Combined Power \(CPU \+ GPU \+ ANE\): (\d+) mW")


@dataclass(frozen=True)
class Sample:
    """A stretch of time.

    Args:
        end: when it was over, by time.perf_counter.
        seconds: how long it was.
        watts: its mean power.
    """

    end: float
    seconds: float
    watts: float


class PowerLog:
    """Samples as `powermetrics` prints them."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._seconds = 0.0

    def hear(self, line: str, now: float) -> None:
        """Take note of a line of the output."""
        if found := _ELAPSED.search(line):
            self._seconds = float(found[1]) / 1000
        elif found := _POWER.match(line):
            self._samples.append(Sample(now, self._seconds, int(found[1]) / 1000))

    def energy_j(self, start: float, end: float) -> float | None:
        """Joules between two times; None if less than half of it was sampled."""
        shares = [
            (sample, min(end, sample.end) - max(start, sample.end - sample.seconds)) for sample in list(self._samples)
        ]
        seen = [(sample.watts, seconds) for sample, seconds in shares if seconds > 0]
        seconds = sum(each for _, each in seen)
        if seconds < (end - start) / 2:
            return None
        return sum(watts * each for watts, each in seen) / seconds * (end - start)


def can_measure_power() -> bool:
    """Whether this is a Mac, and we are root."""
    return sys.platform == "darwin" and os.geteuid() == 0 and shutil.which("powermetrics") is not None


@contextlib.contextmanager
def power_log() -> Iterator[PowerLog]:
    """Sample the power of this Mac; only where can_measure_power."""
    command = ["powermetrics", "--samplers", "cpu_power,gpu_power", "--buffer-size", "1", "-i", str(INTERVAL_MS)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    source = process.stdout
    assert source is not None
    log = PowerLog()

    def read() -> None:
        for line in source:
            log.hear(line, time.perf_counter())

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield log
    finally:
        process.terminate()
        try:
            process.wait(END_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        thread.join(END_PATIENCE_S)
        source.close()
