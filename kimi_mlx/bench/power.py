"""Power of this Mac, from macOS' `powermetrics`, which needs root. Not tested on hardware yet.

It estimates the power of CPU, GPU and neural engine, without memory, fans and power supply losses. Apple warns
against using it to compare different Macs.
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

STOP_TIMEOUT_S = 2.0

_ELAPSED = re.compile(r"\*\*\* Sampled system activity .*\(([\d.]+)ms elapsed\)")
_POWER = re.compile(r"Combined Power \(CPU \+ GPU \+ ANE\): (\d+) mW")


@dataclass(frozen=True)
class Sample:
    """Power during an interval.

    Args:
        end: end of the interval, by time.perf_counter.
        seconds: length of the interval.
        watts: mean power.
    """

    end: float
    seconds: float
    watts: float


class PowerLog:
    """Samples from the output of `powermetrics`."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._seconds = 0.0

    def add_line(self, line: str, now: float) -> None:
        """Parse a line of the output."""
        if match := _ELAPSED.search(line):
            self._seconds = float(match[1]) / 1000
        elif match := _POWER.match(line):
            self._samples.append(Sample(now, self._seconds, int(match[1]) / 1000))

    def energy_j(self, start: float, end: float) -> float | None:
        """Return the joules between two times; None if less than half of that time was sampled."""
        shares = [
            (sample, min(end, sample.end) - max(start, sample.end - sample.seconds)) for sample in list(self._samples)
        ]
        seen = [(sample.watts, seconds) for sample, seconds in shares if seconds > 0]
        seconds = sum(sampled_s for _, sampled_s in seen)
        if seconds < (end - start) / 2:
            return None
        return sum(watts * sampled_s for watts, sampled_s in seen) / seconds * (end - start)


def can_measure_power() -> bool:
    """Whether this is a Mac and we are root."""
    return sys.platform == "darwin" and os.geteuid() == 0 and shutil.which("powermetrics") is not None


@contextlib.contextmanager
def power_log() -> Iterator[PowerLog]:
    """Sample the power of this Mac. Requires can_measure_power."""
    command = ["powermetrics", "--samplers", "cpu_power,gpu_power", "--buffer-size", "1", "-i", str(INTERVAL_MS)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    source = process.stdout
    assert source is not None
    log = PowerLog()

    def read() -> None:
        for line in source:
            log.add_line(line, time.perf_counter())

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield log
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        thread.join(STOP_TIMEOUT_S)
        source.close()
