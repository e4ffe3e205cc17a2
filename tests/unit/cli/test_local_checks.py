"""The doctor's checks of a server's own machine: in the background, rarely, and with remedies."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kimi_mlx.cli import local_checks
from kimi_mlx.cli.local_checks import LocalChecks, check_this_machine
from kimi_mlx.cluster.doctor.host_checks import check_cache_disk
from kimi_mlx.cluster.doctor.memory_need import ModelNeed

NEED = ModelNeed("m", None, 10**6, 10**6, 1, 1, 1, is_here=True)
HUGE = ModelNeed("m", None, 10**15, 10**6, 1, 1, 1, is_here=True)


def checks_of(need: ModelNeed, cache_dir: Path | None = None, held_bytes: int = 0) -> LocalChecks:
    return LocalChecks("here", need, 1, lambda: held_bytes, cache_dir)


def test_a_small_model_has_no_problems(tmp_path: Path) -> None:
    findings = check_this_machine(checks_of(NEED, tmp_path / "missing" / "cache"))
    assert {"memory", "disk", "prompt cache"} <= {finding.check for finding in findings}
    assert {finding.host for finding in findings} == {"here"}
    assert {finding.state for finding in findings if finding.check in ("memory", "disk")} == {"ok"}


def test_problems_have_remedies() -> None:
    problems = [finding for finding in check_this_machine(checks_of(HUGE)) if finding.state == "problem"]
    assert problems
    assert all(finding.remedy for finding in problems)
    full = check_cache_disk("here", "/folder", 10**9, 2 * 10**9)
    assert (full.state, "1.0 GB are free" in full.message) == ("warning", True)
    assert "--cache-dir" in (full.remedy or "")
    assert check_cache_disk("here", "/folder", 3 * 10**9, 2 * 10**9).state == "ok"


def test_memory_that_the_model_holds_counts_as_free() -> None:
    [before, after] = [
        next(finding for finding in check_this_machine(checks) if finding.check == "memory")
        for checks in (checks_of(NEED), checks_of(NEED, held_bytes=10**15))
    ]
    assert before.message != after.message
    assert after.state == "ok"


def test_they_are_made_in_the_background_and_again_when_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []

    def check_slowly(checks: LocalChecks) -> list[object]:
        made.append(time.monotonic())
        time.sleep(0.1)
        return []

    monkeypatch.setattr(local_checks, "check_this_machine", check_slowly)
    checks = checks_of(NEED)
    started_at = time.monotonic()
    assert checks.findings() is None
    assert time.monotonic() - started_at < 0.1
    wait_for(lambda: checks.findings() == ())
    assert len(made) == 1
    monkeypatch.setattr(local_checks, "RECHECK_S", 0.0)
    checks._next_check_at = 0.0
    assert checks.findings() == ()  # the old ones meanwhile
    wait_for(lambda: len(made) >= 2)


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 20
    assert callable(condition)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
