"""What is said before a large download."""

from __future__ import annotations

import pytest

from kimi_mlx.cli.fetch_model import describe_download
from kimi_mlx.cluster.hosts.machine import LocalMachine, gpu_limit
from kimi_mlx.units import GB, GIB


def mac(memory_gib: int) -> LocalMachine:
    memory = memory_gib * GIB
    return LocalMachine("Apple M3 Ultra", memory, gpu_limit(memory, None), is_mac=True)


@pytest.mark.parametrize(
    ("memory_gib", "needed_gib", "end"),
    [
        (512, 300, "it needs 300.0 GiB of memory, this machine has 512.0 GiB"),
        (512, 450, "has 512.0 GiB, and lets the GPU use 384.0 GiB of it (`kimi-mlx models kimi-k2`)"),
        (24, 590, "it needs 590.0 GiB of memory, this machine has 24.0 GiB, so it does not fit"),
    ],
)
def test_size_time_disk_and_memory(memory_gib: int, needed_gib: int, end: str) -> None:
    text = describe_download("kimi-k2", 577 * GB, 1000 * GB, needed_gib * GIB, mac(memory_gib))
    start = "`kimi-k2` is not on this machine: 577.0 GB to download (13 h at 100 Mbit/s or 77 min at 1 Gbit/s)"
    assert text.startswith(f"{start}; the disk has 1.0 TB free; ")
    assert text.endswith(end)


def test_a_small_disk_and_an_unknown_model() -> None:
    text = describe_download("owner/model", 9 * GB, 5 * GB, None, mac(24))
    assert text.endswith("(12 min at 100 Mbit/s or 1 min at 1 Gbit/s); the disk has 5.0 GB free, which is too little")
