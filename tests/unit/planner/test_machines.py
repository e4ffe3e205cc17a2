"""Parsing of machines, and the table of chips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kimi_mlx.errors import ConfigError, UsageError
from kimi_mlx.planner.chips import chips
from kimi_mlx.planner.machines import find_chip, machine_names, machine_of_host, name_of_kind, parse_machines
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


@pytest.mark.parametrize(
    ("text", "bandwidth", "tflops", "count"),
    [
        ("m6-ultra-512:1500GB/s", 1500, 114 * 1500 / 1200, 1),
        ("M6 Ultra 512:1.5 TB/s:150 TFLOPS x2", 1500, 150, 2),
        ("m6-ultra-512x2:1500gb/s", 1500, 142.5, 2),
        ("m2-extreme-384:1600GB/s", 1600, 28.6 * 1600 / 819, 1),
        ("m5-max-64:460GB/s", 460, 55, 1),
        ("m5-max-128", 614, 69, 1),
        ("m5-max-36", 460, 55, 1),
        ("m5-ultra-512:140TFLOPS", 1200, 140, 1),
        ("lab-mac-96:700GB/s", 700, 66.5, 1),
    ],
)
def test_given_rates_describe_a_chip_or_choose_a_variant(
    text: str, bandwidth: float, tflops: float, count: int
) -> None:
    machines = parse_machines(text)
    assert len(machines) == count
    for machine in machines:
        assert machine.chip.bandwidth_gb_per_s == bandwidth
        assert machine.chip.tflops_fp16 == pytest.approx(tflops)
        assert machine.is_known
        (again,) = parse_machines(name_of_kind(machine))
        assert again.chip.bandwidth_gb_per_s == bandwidth


@pytest.mark.parametrize(
    "text",
    ["m6-ultra-512", "m6-ultra:1500GB/s", "m6-ultra-512:0GB/s", "m6-ultra-0:1500GB/s", "m3-ultra-512:0TFLOPS"],
)
def test_errors_of_incomplete_machines_show_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_machines(text)
    assert "`m6-ultra-512:1500GB/s:150TFLOPS`" in str(caught.value.hint)


def test_numbers_with_many_digits_are_refused() -> None:
    for text in (f"m3-ultra-{'5' * 5000}", f"m3-ultra-512x{'5' * 5000}", f"m6-ultra-512:{'5' * 5000}GB/s"):
        with pytest.raises(UsageError, match="unknown machine"):
            parse_machines(text)


def test_a_given_fp16_rate_is_marked_as_unverified() -> None:
    for machine in parse_machines("m5-ultra-512:140TFLOPS,m5-max-64:460GB/s:60TFLOPS"):
        assert machine.chip.unverified == "tflops_fp16: given by the user"


@pytest.fixture
def chips_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of the user's file of chips, in an empty folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "kimi-mlx").mkdir()
    return tmp_path / "kimi-mlx" / "chips.json"


def test_the_users_chips_come_first(chips_file: Path) -> None:
    row = {"chip": "m6-ultra", "memory_gb": [512, 1024], "bandwidth_gb_per_s": 1500, "ssd_gb_per_s": 20}
    corrected = {"chip": "m5-ultra", "memory_gb": [512], "bandwidth_gb_per_s": 1100, "tflops_fp16": 120}
    chips_file.write_text(json.dumps({"chips": [row, corrected]}))
    mine, other = parse_machines("m6-ultra-1024,m5-ultra-512")
    assert (mine.chip.bandwidth_gb_per_s, mine.chip.ssd_gb_per_s, mine.chip.neural_accelerators) == (1500, 20, True)
    assert (other.chip.bandwidth_gb_per_s, other.chip.tflops_fp16) == (1100, 120)
    assert str(chips_file) in mine.chip.source
    assert parse_machines("m5-ultra-256")[0].chip.bandwidth_gb_per_s == 1200
    assert machine_of_host("mac-a", "Apple M6 Ultra", 1024 * GIB, None).chip == mine.chip


def test_a_file_of_chips_may_begin_with_a_byte_order_mark(chips_file: Path) -> None:
    chips_file.write_text('{"chips": []}', encoding="utf-8-sig")
    assert parse_machines("m3-ultra-512")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not JSON"),
        pytest.param("[" * 100_000, "is not JSON", id="nested"),
        ("[]", "no list `chips`"),
        ('{"chips": {}}', "no list `chips`"),
        ('{"chips": [7]}', "chip 1 is not an object, but 7"),
        ('{"chips": [{"chip": "m6", "memory_gb": [8]}]}', "chip 1 has no `bandwidth_gb_per_s`"),
        ('{"chips": [{"chip": "m6", "memory_gb": 8, "bandwidth_gb_per_s": 9}]}', "`memory_gb` of chip 1 is 8"),
        ('{"chips": [{"chip": "m6", "memory_gb": [8], "bandwidth_gb_per_s": "9"}]}', 'is "9", but must be a number'),
        ('{"chips": [{"chip": "M6!", "memory_gb": [8], "bandwidth_gb_per_s": 9}]}', "must be a name"),
        ('{"chips": [{"chip": "m6", "memory_gb": [8], "bandwidth_gb_per_s": 9, "tflops": 1}]}', "field `tflops`"),
        ('{"chips": [{"chip": "m6", "memory_gb": [8], "bandwidth_gb_per_s": true}]}', "is true, but must be"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_broken_file_of_chips_is_an_error_that_names_it(chips_file: Path, text: str, problem: str) -> None:
    chips_file.write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError) as caught:
        parse_machines("m3-ultra-512")
    assert problem in caught.value.message
    assert str(chips_file) in caught.value.message
    assert caught.value.hint


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
