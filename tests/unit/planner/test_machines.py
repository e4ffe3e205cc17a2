"""Parsing of machines, and the table of chips."""

from __future__ import annotations

import pytest

from kimi_mlx.errors import UsageError
from kimi_mlx.planner.machines import chips, find_chip, machine_names, machine_of_host, parse_machines
from kimi_mlx.units import GIB


def test_parse_one_machine() -> None:
    (machine,) = parse_machines("m3-ultra-512")
    assert machine.name == "m3-ultra-512"
    assert machine.memory_bytes == 512 * GIB
    assert machine.gpu_bytes == 384 * GIB
    assert machine.raised_gpu_bytes == 504 * GIB
    assert machine.price_usd == 9499


def test_several_machines_get_numbered_names() -> None:
    machines = parse_machines(" M3 Ultra 512x2, m4_max-128 GB ")
    assert [machine.name for machine in machines] == ["m3-ultra-512 #1", "m3-ultra-512 #2", "m4-max-128 #3"]


@pytest.mark.parametrize("name", machine_names())
def test_every_machine_in_the_table_can_be_parsed(name: str) -> None:
    (machine,) = parse_machines(name)
    assert 0 < machine.gpu_bytes <= machine.raised_gpu_bytes <= machine.memory_bytes


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("m3-ultra-500", "96, 256 or 512 GB: for example `m3-ultra-512`"),
        ("m3-ultra", "96, 256 or 512 GB: for example `m3-ultra-512`"),
        ("M5 Ultra", "96, 256 or 512 GB: for example `m5-ultra-512`"),
        ("m4-maxx2", "36, 48, 64 or 128 GB"),
        ("m4", "16, 24 or 32 GB"),
        ("m77-ultra-512", "`m"),
        ("m3-ulta-512", "`m3-ultra-512`"),
        ("studio", "a machine is a chip and its memory in GB"),
        ("mac-studio", "a machine is a chip and its memory in GB"),
        ("m3-ultra-512x2,", "x2"),
        ("", "x2"),
        ("m3-ultra-512x0", "use 1 to 8"),
        ("m3-ultra-512x9", "use 1 to 8"),
        ("m3-ultra-512x5,m3-ultra-512x4", "remove some"),
    ],
)
def test_unknown_machines_are_refused(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_machines(text)
    assert hint in str(caught.value.hint)


def test_memory_size_identifies_the_variant_of_a_chip() -> None:
    assert find_chip("m3-max", 36).bandwidth_gb_per_s == 300
    assert find_chip("m3-max", 128).bandwidth_gb_per_s == 400


def test_machine_of_a_hosts_own_description() -> None:
    machine = machine_of_host("mac-a", "Apple M3 Ultra", 512 * GIB, 500_000)
    assert machine.chip.chip == "m3-ultra"
    assert machine.gpu_bytes == 500_000 * 1024**2
    for brand, memory in ((None, GIB), ("Apple M3 Ultra", None), ("Intel(R) Xeon(R)", GIB), ("Apple M77", GIB)):
        with pytest.raises(UsageError):
            machine_of_host("mac-a", brand, memory, None)


def test_every_chip_has_a_source() -> None:
    assert {chip.chip.split("-")[0] for chip in chips()} == {"m1", "m2", "m3", "m4", "m5"}
    for chip in chips():
        assert chip.source
        assert chip.memory_gb == tuple(sorted(chip.memory_gb))
        assert 60 <= chip.bandwidth_gb_per_s <= 1300
        assert (chip.thunderbolt >= 5) == chip.has_rdma
