"""Chip and memory of this machine, and the GPU's share."""

from __future__ import annotations

import pytest

from kimi_mlx.cluster.hosts.machine import gpu_limit, local_machine
from kimi_mlx.units import GIB


def test_this_machine_has_memory_and_a_chip() -> None:
    machine = local_machine()
    assert machine.memory_bytes > GIB / 4
    assert 0 < machine.gpu_bytes <= machine.memory_bytes
    assert machine.chip


@pytest.mark.parametrize(
    ("printed", "gib"), [(None, 384), ("0", 384), ("nonsense", 384), ("491520", 480), ("999999999", 512)]
)
def test_gpu_limit_is_the_set_one_or_three_quarters(printed: str | None, gib: int) -> None:
    assert gpu_limit(512 * GIB, printed) == gib * GIB
