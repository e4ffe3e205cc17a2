"""Wired memory that belongs to no process: published cases, and outputs of `top`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cluster.doctor.wired_memory import check_wired_memory, find_lost_memory, leaked_bytes
from kimi_mlx.cluster.hosts.probes import MIN_PROCESSES, process_memory
from kimi_mlx.units import GIB
from tests.unit.cluster import captured
from tests.unit.cluster.doctor.test_host_checks import MAC

sizes = st.integers(0, 1 << 40)


@pytest.mark.parametrize(
    ("wired_gib", "process_gib", "memory_gib", "state"),
    [
        (5, 8, 512, "ok"),  # after an orderly exit (gh:jundot/omlx#2184)
        (424, 430, 512, "ok"),  # a loaded model
        (414, 8, 512, "problem"),  # after SIGKILL, no process left (gh:jundot/omlx#2184)
        (462, 95, 512, "problem"),  # after several kills, beside a live model (gh:jundot/omlx#2855)
        (13, 20, 48, "ok"),  # the day after a restart, a busy laptop
        (6, 4, 16, "ok"),
        (30, 6, 64, "problem"),
    ],
)
def test_published_cases(wired_gib: int, process_gib: int, memory_gib: int, state: str) -> None:
    facts = replace(MAC, wired_bytes=wired_gib * GIB, process_bytes=process_gib * GIB, memory_bytes=memory_gib * GIB)
    finding = check_wired_memory(facts)
    assert finding.state == state
    assert f"{wired_gib}.0 GiB wired" in finding.message
    assert (finding.remedy or "").startswith("restart this Mac") == (state == "problem")


def test_lost_memory_is_named() -> None:
    finding = check_wired_memory(replace(MAC, wired_bytes=414 * GIB, process_bytes=8 * GIB))
    assert "at least 384.6 GiB belong to no process" in finding.message


@pytest.mark.parametrize("unknown", ["wired_bytes", "process_bytes", "memory_bytes"])
def test_unknown_values_are_no_problem(unknown: str) -> None:
    facts = replace(MAC, wired_bytes=414 * GIB, process_bytes=8 * GIB)
    assert check_wired_memory(replace(facts, **{unknown: None})).state == "ok"  # pyright: ignore[reportArgumentType]


@given(sizes, sizes, sizes)
def test_lost_memory_is_at_most_the_wired_memory_without_processes(wired: int, processes: int, memory: int) -> None:
    assert 0 <= leaked_bytes(wired, processes, memory) <= max(wired - processes, 0)


def test_memory_of_processes() -> None:
    assert process_memory(captured.TOP) == captured.PROCESS_BYTES
    few = "\n".join(captured.TOP.splitlines()[:-20])
    assert len(few.splitlines()) < MIN_PROCESSES + 8
    assert process_memory(few) is None
    assert process_memory("") is None


@pytest.mark.parametrize(
    ("wired_gib", "is_lost", "runs_top"), [(5, False, False), (100, False, True), (480, True, True)]
)
def test_this_mac_is_checked_before_a_model_is_loaded(
    wired_gib: int, is_lost: bool, runs_top: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = wired_gib * GIB // 16384
    outputs = {
        "vm_stat": f"(page size of 16384 bytes)\nPages free: 9.\nPages wired down: {pages}.",
        "sysctl": str(512 * GIB),
        "top": captured.TOP,
    }
    for name, output in outputs.items():
        (tmp_path / f"{name}.txt").write_text(output + "\n")
        (tmp_path / name).write_text(f"#!/bin/sh\n: > {tmp_path}/{name}.ran\ncat {tmp_path}/{name}.txt\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert find_lost_memory() is None  # not a Mac
    monkeypatch.setattr(sys, "platform", "darwin")
    finding = find_lost_memory()
    assert (finding is not None) == is_lost
    assert (tmp_path / "top.ran").exists() == runs_top
    if finding is not None:
        assert "belong to no process" in finding.message
        assert (finding.remedy or "").startswith("restart this Mac")
