"""The report of the checks: one screen of text, and JSON."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kimi_mlx.cli.app import app
from kimi_mlx.cli.doctor_gpu import check_gpu
from kimi_mlx.errors import UsageError
from kimi_mlx.gpu_check.__main__ import main
from kimi_mlx.gpu_check.checks import CHECKS, CheckResult, Comparison, Measurement
from kimi_mlx.gpu_check.report import check_lines, conclusion, heading, is_ok, measurement_lines, to_dict
from kimi_mlx.model.device import has_gpu

DESCRIPTION: dict[str, Any] = {
    "has_device": True,
    "kind": "metal",
    "name": "Apple M3 Ultra",
    "memory_bytes": 512 * 2**30,
    "info": {},
    "versions": {"kimi_mlx": "0.2.0", "mlx": "0.32.4", "python": "3.12.1", "system": "macOS 27.0"},
}
FAILED = CheckResult(
    CHECKS[2],
    "failed",
    [
        Comparison("T=9", 0.01, 0.02),
        *(Comparison(f"T={n}", n, 0.02) for n in (1, 2, 3)),
        Comparison("nan", math.nan, 1),
    ],
    seconds=12.3,
)
RESULTS = [
    CheckResult(CHECKS[0], comparisons=[Comparison("K2-shaped", 0.001, 0.002)], seconds=61.0),
    FAILED,
    CheckResult(CHECKS[9], "skipped", message="no second rank"),
    CheckResult(CHECKS[11], measurements=[Measurement("decode step", f"{n} k cached", n, "ms") for n in (1, 32)]),
]


def test_text_fits_a_screen_and_names_what_failed() -> None:
    lines = [heading(DESCRIPTION), *(line for result in RESULTS for line in check_lines(result))]
    lines += [*measurement_lines(RESULTS), conclusion(RESULTS)]
    assert lines == [
        "Apple M3 Ultra (metal, 512.0 GiB), macOS 27.0, MLX 0.32.4, kimi-mlx 0.2.0, Python 3.12.1",
        "✓ ok       logits against the CPU in float32        1 comparison, the worst at 50 % of its limit  (61 s)",
        "✗ failed   fused against blockwise attention        4 of 5 comparisons beyond the limit  (12 s)",
        "           T=1: error 1, limit 0.02",
        "           T=2: error 2, limit 0.02",
        "           T=3: error 3, limit 0.02",
        "           and 1 more",
        "- skipped  two ranks: hybrid and pipeline           no second rank  (0 s)",
        "✓ ok       times and memory                         2 values  (0 s)",
        "decode step (ms): 1 k cached 1, 32 k cached 32",
        "1 check did not pass (attention). Please open an issue with `kimi-mlx doctor --gpu --json`.",
    ]
    assert conclusion(RESULTS[:1]) == "All checks passed."


def test_json_has_every_comparison() -> None:
    report = json.loads(json.dumps(to_dict(DESCRIPTION, RESULTS), allow_nan=False))
    assert report["ok"] is is_ok(RESULTS) is False
    assert report["device"]["kind"] == "metal"
    assert [check["state"] for check in report["checks"]] == ["ok", "failed", "skipped", "ok"]
    assert report["checks"][1]["comparisons"][4] == {"name": "nan", "error": "nan", "limit": 1, "ok": False}
    assert report["checks"][3]["measurements"][1]["value"] == 32


@pytest.mark.slow
def test_the_command_runs_the_checks(capsys: pytest.CaptureFixture[str]) -> None:
    rotations = [check for check in CHECKS if check.name == "rotations"]
    check_gpu(True, "cpu", "small", rotations)
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert len(report["checks"][0]["comparisons"]) == 16


def test_an_unknown_check_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "nosuch"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "no such check: nosuch" in capsys.readouterr().err


def test_a_failed_check_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("kimi_mlx.cli.doctor_gpu.run_checks", lambda *args: (result for result in [FAILED]))
    with pytest.raises(typer.Exit) as caught:
        check_gpu(False, "cpu", "small", [])
    assert caught.value.exit_code == 1
    assert "1 check did not pass (attention)" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["kimi-k2"], ["--hosts", "a,b"], ["--quick"], ["--save", "two.json"]])
def test_the_gpu_is_checked_alone(more: list[str]) -> None:
    error = CliRunner().invoke(app, ["doctor", "--gpu", *more]).exception
    assert isinstance(error, UsageError)
    assert "this machine" in error.message


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_checked() -> None:
    error = CliRunner().invoke(app, ["doctor", "--gpu"]).exception
    assert isinstance(error, UsageError)
    assert "has no GPU" in error.message
