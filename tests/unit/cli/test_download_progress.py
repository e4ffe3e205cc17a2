"""Progress of downloads and conversions without a terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.cli import download_progress
from kimi_mlx.cli.download_progress import byte_progress, fetch_label
from kimi_mlx.store.model_ref import resolve_model_name


@pytest.mark.parametrize(("after_s", "num_lines"), [(100.0, 0), (0.0, 2)])
def test_a_task_prints_lines_only_if_it_takes_long(
    after_s: float, num_lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download_progress, "PROGRESS_AFTER_S", after_s)
    with byte_progress("converting", 3_600_000, is_quiet=False) as advance:
        for _ in range(6):
            advance(600_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == num_lines
    assert not lines or lines[-1].startswith("converting: 3.6 MB of 3.6 MB")


def test_a_folder_is_read_and_not_downloaded() -> None:
    moonlight = resolve_model_name("moonlight")
    assert fetch_label(moonlight) == "downloading moonlight"
    assert fetch_label(replace(moonlight, folder=Path("/models/a"), name="/models/a")) == "reading /models/a"
