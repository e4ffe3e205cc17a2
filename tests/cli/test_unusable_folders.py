"""Folders of the user that cannot be used: the command runs without them, or one line says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_mlx.folders import VARIABLES
from tests.command import call

KINDS = ("file", "missing", "name too long")
COMMANDS = (
    "models",
    "plan kimi-k2 --machines m3-ultra-512x2",
    "doctor --quick",
    "chat -p hi --no-thinking --max-tokens 4",
    "download kimi-mini",
    "download kimi-mini --ranks 2",
    "rm moonlight --yes",
    "bench --prompt-tokens 8 --generation-tokens 4 --repeat 1 --warmup 0",
)
SAMPLE = [  # one variable and kind for each command, because each command takes seconds; the rest is a sweep
    pytest.param(
        variable,
        command,
        kind,
        marks=pytest.mark.slow
        if variable == ("TMPDIR", "XDG_CACHE_HOME")[index % 2] and index % len(KINDS) == KINDS.index(kind)
        else pytest.mark.sweep,
    )
    for variable in VARIABLES
    for index, command in enumerate(COMMANDS)
    for kind in KINDS
]


def unusable(folder: Path, kind: str) -> Path:
    """Return the path of a folder that cannot be used, even by root."""
    (folder / "file").touch()
    return {"file": folder / "file", "missing": Path("/proc/no/such"), "name too long": folder / ("x" * 300)}[kind]


def check(code: int, text: str) -> None:
    assert "Traceback" not in text
    assert code in (0, 1, 2)
    assert code == 0 or "hint: " in text or "→" in text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variable", VARIABLES)
def test_models_prints_no_traceback(variable: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KIMI_MLX_STORES", raising=False)
    done = call("models", variables={variable: str(unusable(tmp_path, kind))})
    check(done.returncode, done.stderr)


def test_the_hint_names_the_variable(tmp_path: Path) -> None:
    done = call("models", variables={"KIMI_MLX_STORES": str(unusable(tmp_path, "name too long"))})
    assert done.returncode == 1
    assert "File name too long" in done.stderr
    assert "or set KIMI_MLX_STORES to another folder" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("variable", "command", "kind"), SAMPLE)
def test_every_command_runs_or_says_what_to_do(variable: str, command: str, kind: str, tmp_path: Path) -> None:
    variables = {**os.environ, "HOME": str(tmp_path), variable: str(unusable(tmp_path, kind))}
    line = [sys.executable, "-m", "kimi_mlx", *command.split()]
    done = subprocess.run(line, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    check(done.returncode, done.stderr + done.stdout)
