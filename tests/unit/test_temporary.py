"""Temporary folders of processes that are gone are removed; those in use and other people's files are kept."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kimi_mlx.temporary import LOCK_NAME, PREFIX, remove_leftover_folders, temporary_folder

HOLDER = """
import sys, tempfile
from kimi_mlx.temporary import temporary_folder
with temporary_folder("held-") as folder:
    (folder.path / "data").write_text("x")
    print(folder.path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_folder_is_removed_after_the_block(folder: Path) -> None:
    with temporary_folder("a-") as created:
        assert created.path.parent == folder
        assert created.path.name.startswith(f"{PREFIX}a-")
        remove_leftover_folders()
        assert (created.path / LOCK_NAME).exists()
    assert list(folder.iterdir()) == []


def test_folder_of_a_killed_process_is_removed_by_the_next_one(folder: Path) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().strip())
        remove_leftover_folders()
        assert (held / "data").exists()
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    assert held.exists()
    with temporary_folder():
        assert not held.exists()


def test_other_folders_are_kept(folder: Path) -> None:
    for name in (f"{PREFIX}clone", f"{PREFIX}0123456789abcdef-7-x", "other"):
        (folder / name).mkdir()
    target = folder / "other" / LOCK_NAME
    target.touch()
    (folder / f"{PREFIX}clone" / LOCK_NAME).symlink_to(target)
    remove_leftover_folders()
    assert len(list(folder.iterdir())) == 3
