"""The measurement of SSDs, and what the doctor says of memory if experts may be read from them."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.cluster.doctor.host_checks import check_memory, check_ssd, check_wired_limit
from kimi_mlx.cluster.doctor.memory_need import HostNeed, RankNeed
from kimi_mlx.cluster.doctor.ssd_probe import DEPTHS, measure, probe
from kimi_mlx.cluster.doctor.ssd_test import SsdRequest, measure_ssds, parse_result
from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.hosts.ssh import ScriptResult
from kimi_mlx.sizing.ssd import THIS_HOST, SsdSpeed, save_speeds, saved_speeds
from kimi_mlx.units import GIB

MAC = Facts("mac-a", True, system="Darwin", memory_bytes=128 * GIB, free_bytes=120 * GIB, wired_limit_mb=0)
K2 = HostNeed(330 * GIB, 300 * GIB, GIB)
SPEED = SsdSpeed("/s", 12_402_688, {1: 3e9, 4: 6e9, 9: 7e9, 16: 6.9e9}, 1.0)


def test_files_of_the_model_are_read(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.safetensors").write_bytes(os.urandom(1 << 20))
    speed = probe([tmp_path], tmp_path / "none", 100_000, seconds=0.01, min_bytes=1 << 20)
    assert speed.folder == str(tmp_path.resolve())
    assert speed.block_bytes == 25 * 4096
    assert tuple(speed.bytes_per_s) == DEPTHS
    assert min(speed.bytes_per_s.values()) > 0


def test_without_files_a_temporary_one_is_written_and_removed(tmp_path: Path) -> None:
    speed = probe([], tmp_path / "stores" / "none", 4096, seconds=0.01, min_bytes=1 << 20)
    assert speed.folder == str(tmp_path.resolve())
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="not enough free space"):
        probe([], tmp_path, 4096, min_bytes=1 << 60)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        measure([tmp_path / "none"], 4096)


@pytest.mark.sweep
def test_a_host_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    request = SsdRequest(sys.executable, 4096, str(tmp_path), [])
    (speed,) = measure_ssds({"localhost": request}).values()
    assert isinstance(speed, SsdSpeed), speed
    assert saved_speeds()[THIS_HOST] == speed


@pytest.mark.parametrize(
    ("stdout", "stderr", "reason"),
    [
        ('{"error": "not enough free space in `/s`"}', "", "not enough free space in `/s`"),
        ("", "Traceback\nModuleNotFoundError: kimi_mlx", "ModuleNotFoundError: kimi_mlx"),
        ("garbage", "", "exit code 1"),
    ],
)
def test_a_failed_measurement_says_why(stdout: str, stderr: str, reason: str) -> None:
    assert parse_result(ScriptResult("mac-a", 1, stdout, stderr, 1.0)) == reason
    finding = check_ssd("mac-a", reason, None)
    assert (finding.state, (finding.remedy or "").startswith("free disk space")) == ("warning", "free space" in reason)


def test_speeds_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert saved_speeds() == {}
    save_speeds({"mac-a": SPEED})
    save_speeds({"mac-b": SPEED})
    assert saved_speeds() == {"mac-a": SPEED, "mac-b": SPEED}
    assert parse_result(ScriptResult("mac-a", 0, f"hello\n{json.dumps(SPEED.to_dict())}\n", "", 1.0)) == SPEED
    (tmp_path / "kimi-mlx" / "ssd.json").write_text("{")
    assert saved_speeds() == {}


def test_a_slow_ssd_is_reported() -> None:
    assert check_ssd("mac-a", SPEED, None).state == check_ssd("mac-a", SPEED, 7.4e9).state == "ok"
    slow = check_ssd("mac-a", SPEED, 13.6e9)
    assert (slow.state, "7.00 GB/s" in slow.message, "13.6 GB/s are usual" in slow.message) == ("warning", True, True)
    assert "KIMI_MLX_STORES" in (slow.remedy or "")


def test_experts_that_do_not_fit_are_a_warning() -> None:
    finding = check_memory(MAC, K2)
    assert finding.state == "warning"
    assert "needs 330.0 GiB, at least 31.0 GiB with experts on the SSD" in finding.message
    assert "about 28 % of the experts stay in memory" in finding.message
    limit = check_wired_limit(MAC, K2)
    assert limit.state == "warning"
    assert "about 20 % of the experts" in limit.message
    assert "wired_limit_mb=122880`, which keeps 28 %" in (limit.remedy or "")
    assert check_wired_limit(replace(MAC, wired_limit_mb=122880), K2).state == "ok"


def test_a_limit_that_keeps_all_experts_is_suggested() -> None:
    need = HostNeed(100 * GIB, 90 * GIB, GIB)
    finding = check_wired_limit(MAC, need)
    assert finding.state == "warning"
    assert "wired_limit_mb=102400`, which keeps all of them" in (finding.remedy or "")


def test_a_rest_that_does_not_fit_is_a_problem() -> None:
    small = replace(MAC, memory_bytes=32 * GIB, free_bytes=30 * GIB)
    finding = check_memory(small, K2)
    assert finding.state == "problem"
    assert "at least 31.0 GiB with experts on the SSD" in finding.message
    assert check_wired_limit(small, K2).state == "problem"
    raisable = check_wired_limit(replace(small, memory_bytes=40 * GIB), K2)  # 30 GiB by default, 32 GiB at most
    assert raisable.state == "problem"
    assert "sudo sysctl iogpu.wired_limit_mb=32768" in (raisable.remedy or "")


def test_a_set_memory_for_experts_is_what_a_rank_needs() -> None:
    need = RankNeed(320 * GIB, 10 * GIB, 300 * GIB, GIB, budget_bytes=50 * GIB)
    assert need.host_need == HostNeed(80 * GIB)
    assert check_memory(MAC, need.host_need).state == "ok"
    assert RankNeed(320 * GIB, 10 * GIB).host_need.kept_share(128 * GIB) is None
