"""Rank logs: one file per rank, the oldest are deleted, and a failure to write is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_mlx.cluster.ring.rank_log import KEPT_FILES, open_logs


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "kimi-mlx"


def test_each_rank_has_a_file_in_the_state_folder(state: Path) -> None:
    files = open_logs(2)
    assert [file and file.parent for file in files] == [state / "logs"] * 2
    assert [file and file.name.rpartition("-")[2] for file in files] == ["0.log", "1.log"]
    assert not list(state.rglob("*.log"))  # files are created at the first output


def test_oldest_logs_are_deleted_but_no_other_files(state: Path) -> None:
    folder = state / "logs"
    folder.mkdir(parents=True)
    old = [folder / f"20200101-{number:06}-1-rank-0.log" for number in range(KEPT_FILES + 5)]
    for file in [*old, folder / "notes.txt"]:
        file.touch()
    new = open_logs(3)
    assert [file for file in old if file.exists()] == old[5:]
    assert all(file is not None and file.parent == folder for file in new)
    assert (folder / "notes.txt").exists()


def test_state_folder_is_not_writable(state: Path) -> None:
    state.touch()
    assert open_logs(2) == [None, None]


def test_user_has_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert open_logs(1) == [None]
