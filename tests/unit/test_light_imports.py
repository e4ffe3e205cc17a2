"""Packages that must not import MLX or other heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("packages", "banned"),
    [
        (["kimi_mlx.cluster", "kimi_mlx.planner", "kimi_mlx.sizing"], ["mlx", "mlx_lm", "transformers"]),
        pytest.param(
            ["kimi_mlx.cli", "kimi_mlx.engine", "kimi_mlx.session"], ["mlx_lm", "transformers"], marks=pytest.mark.slow
        ),
    ],
)
def test_light_packages_stay_light(packages: list[str], banned: list[str]) -> None:
    """Import every module of packages in a new process; import-linter does not see side effects of an import."""
    code = (
        "import importlib, pkgutil, sys\n"
        f"for package in {packages}:\n"
        "    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + '.'):\n"
        "        importlib.import_module(module.name)\n"
        f"        assert not set({banned}) & set(sys.modules), module.name"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
