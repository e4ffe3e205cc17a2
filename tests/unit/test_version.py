"""The version is the same everywhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import kimi_mlx
from kimi_mlx.cli.version_report import find_commit
from tests.command import call

ROOT = Path(__file__).resolve().parents[2]


def test_project_file_package_and_changelog_agree_on_the_version() -> None:
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    changes = re.search(r"^## \[(\d.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project is not None
    assert changes is not None
    assert project[1] == changes[1] == kimi_mlx.__version__


def test_versions_on_the_command_line() -> None:
    done = call("--version")
    assert re.fullmatch(r"kimi-mlx \S+ \((commit [0-9a-f]{12}, )?MLX [0-9.]+, Python 3[0-9.]+\S*\)\n", done.stdout)
    assert json.loads(call("--version", "--json").stdout)["kimi-mlx"] == kimi_mlx.__version__


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_commit_of_a_clone_and_of_a_worktree(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "kimi_mlx"
    assert find_commit(package) is None
    git("init", "--quiet")
    assert find_commit(package) is None
    git("commit", "--quiet", "--allow-empty", "--message", "x")
    commit = git("rev-parse", "HEAD")
    assert find_commit(package) == commit
    git("worktree", "add", "--quiet", str(tmp_path / "tree"))
    assert find_commit(tmp_path / "tree" / "kimi_mlx") == commit
    git("pack-refs", "--all")
    assert find_commit(package) == find_commit(tmp_path / "tree" / "kimi_mlx") == commit
    git("checkout", "--quiet", "--detach")
    assert find_commit(package) == commit
    package.mkdir()
    (package / "commit.txt").write_text("abc\n")
    assert find_commit(package) == "abc"
