"""The scripts that set up the environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["scripts/demo", "scripts/test", "scripts/check", ".ci/run"]


def bash(folder: Path, code: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run bash code in a folder; `path` replaces PATH."""
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    command = [shutil.which("bash") or "bash", "-euo", "pipefail", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Copy the files that the set-up reads, with an environment that it accepts as complete."""
    tree = tmp_path / "with blanks" / "kimi"
    (tree / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", tree)
    shutil.copy(ROOT / "scripts" / "lib.sh", tree / "scripts")
    (tree / ".venv" / "bin").mkdir(parents=True)
    (tree / ".venv" / "bin" / "python").symlink_to(sys.executable)
    result = bash(tree, '. scripts/lib.sh; printf "%s\\n" "$root" >"$place"; fingerprint >"$(stamp runtime)"')
    assert result.returncode == 0, result.stderr
    return tree


def is_ready(tree: Path, level: str = "runtime") -> bool:
    return bash(tree, f". scripts/lib.sh; is_ready {level}").returncode == 0


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """Create a folder for PATH with the POSIX tools that the set-up needs, but without Python, pip and uv."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "cat", "cksum", "dirname", "mkdir", "rm"):
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    return folder


def add_python(folder: Path, code: str) -> None:
    file = folder / "python3"
    file.write_text(f"#!/bin/sh\n{code}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable_and_valid_bash(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert bash(ROOT, f"bash -n {script}").returncode == 0


def test_a_second_run_installs_nothing(tree: Path, bare_path: Path) -> None:
    result = bash(tree, '. scripts/lib.sh; prepare runtime; printf "%s" "$python"', path=str(bare_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout == str(tree.resolve() / ".venv" / "bin" / "python")
    assert result.stderr == ""


def test_runtime_packages_are_not_enough_for_the_tests(tree: Path) -> None:
    assert is_ready(tree)
    assert not is_ready(tree, "dev")


def test_a_changed_project_file_requires_a_new_installation(tree: Path) -> None:
    with (tree / "pyproject.toml").open("a") as file:
        file.write("# a new dependency\n")
    assert not is_ready(tree)


def test_an_interrupted_installation_is_repeated(tree: Path) -> None:
    (tree / ".venv" / ".kimi-mlx-unfinished").touch()
    assert not is_ready(tree)
    assert bash(tree, ". scripts/lib.sh; is_usable").returncode != 0


def test_a_moved_folder_gets_a_new_environment(tree: Path) -> None:
    moved = tree.rename(tree.with_name("moved"))
    assert not is_ready(moved)
    assert bash(moved, ". scripts/lib.sh; is_usable").returncode != 0


def test_an_environment_without_its_interpreter_is_not_ready(tree: Path) -> None:
    python = tree / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(tree / "gone")
    assert not is_ready(tree)


def test_no_python_is_an_error_with_a_hint(tree: Path, bare_path: Path) -> None:
    shutil.rmtree(tree / ".venv")
    result = bash(tree, ". scripts/lib.sh; prepare runtime", path=str(bare_path))
    assert result.returncode == 1
    assert "error: kimi-mlx needs Python 3.10 or newer, and there is no `python3`" in result.stderr
    assert "hint: install Python" in result.stderr
    assert not (tree / ".venv").exists()


def test_an_old_python_is_an_error_that_names_it(tree: Path, bare_path: Path) -> None:
    shutil.rmtree(tree / ".venv")
    add_python(bare_path, 'case "$2" in *python_version*) echo 3.8.18 arm64 ;; *) exit 1 ;; esac')
    result = bash(tree, ". scripts/lib.sh; prepare runtime", path=str(bare_path))
    assert result.returncode == 1
    assert f"but `{bare_path}/python3` is 3.8.18 arm64" in result.stderr


def test_a_python_without_venv_is_an_error_that_says_so(tree: Path, bare_path: Path) -> None:
    shutil.rmtree(tree / ".venv")
    add_python(bare_path, 'case "$2" in *ensurepip*) exit 1 ;; *python_version*) echo 3.11.2 x86_64 ;; esac')
    result = bash(tree, ". scripts/lib.sh; prepare runtime", path=str(bare_path))
    assert result.returncode == 1
    assert "(3.11.2 x86_64) lacks the venv module" in result.stderr
    assert "python3-venv" in result.stderr
