"""What this machine has."""

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
def test_the_gpu_may_wire_three_quarters_unless_it_is_told_otherwise(printed: str | None, gib: int) -> None:
    assert gpu_limit(512 * GIB, printed) == gib * GIB
