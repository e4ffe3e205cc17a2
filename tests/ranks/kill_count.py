"""Count the SIGKILLs that this process and the guards of its ranks send. Tests send their own with KILL."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.hosts import ROOT

KILL = os.kill

COUNTER = """
import os, signal
kill = os.kill
def counted(pid, number):
    if number == signal.SIGKILL:
        with open({path!r}, "a") as file:
            file.write(f"{{os.getpid()}} kills {{pid}}\\n")
    kill(pid, number)
os.kill = counted
"""


class Kills:
    """The SIGKILLs of a test.

    Args:
        folder: folder of the test; ranks can import modules from it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._path = folder / "kills"
        self._path.touch()
        (folder / "sitecustomize.py").write_text(COUNTER.format(path=str(self._path)))

    @property
    def sent(self) -> list[str]:
        """Return one line for each SIGKILL."""
        return self._path.read_text().splitlines()

    def kill(self, pid: int, number: int) -> None:
        """Count and send a signal, instead of os.kill."""
        if number == signal.SIGKILL:
            with self._path.open("a") as file:
                file.write(f"front kills {pid}\n")
        KILL(pid, number)


def count_kills(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Kills:
    """Count the SIGKILLs from now on."""
    folder.mkdir()
    kills = Kills(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    monkeypatch.setattr(os, "kill", kills.kill)
    return kills
