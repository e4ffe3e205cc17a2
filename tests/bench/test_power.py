"""Energy from the output of powermetrics."""

from __future__ import annotations

import pytest

from kimi_mlx.bench.power import PowerLog

# Format of the output as published from Macs with an M processor, with our numbers.
CAPTURED = """\
Machine model: Mac15,14
OS version: 24F74

*** Sampled system activity (Sat Jun 14 10:00:00 2025 +0200) (200.50ms elapsed) ***

**** Processor usage ****

E-Cluster Online: 100%
CPU Power: 4000 mW
GPU Power: 96000 mW
ANE Power: 0 mW
Combined Power (CPU + GPU + ANE): 100000 mW

**** GPU usage ****

GPU HW active frequency: 1380 MHz
GPU Power: 95911 mW
"""


def output_lines(end: float, milliwatts: int = 100000) -> list[tuple[str, float]]:
    return [(line, end) for line in CAPTURED.replace("100000 mW", f"{milliwatts} mW").splitlines()]


def test_energy_is_power_times_time_within_the_interval() -> None:
    log = PowerLog()
    for line, now in [*output_lines(10.2, 100000), *output_lines(10.4, 50000)]:
        log.add_line(line, now)
    assert log.energy_j(10.0, 10.2) == pytest.approx(20, rel=0.01)
    assert log.energy_j(10.1, 10.3) == pytest.approx(15, rel=0.01)


def test_an_interval_that_was_hardly_sampled_has_no_energy() -> None:
    log = PowerLog()
    assert log.energy_j(0, 1) is None
    for line, now in output_lines(10.2):
        log.add_line(line, now)
    assert log.energy_j(10.0, 12.0) is None
    assert log.energy_j(10.0, 10.3) == pytest.approx(30, rel=0.01)
