"""Packages that must not import MLX or other heavy libraries."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("package", "banned"),
    [
        ("kimi_mlx", ["mlx", "mlx_lm", "transformers"]),
        ("kimi_mlx.cluster", ["mlx", "mlx_lm"]),
        ("kimi_mlx.planner", ["mlx", "mlx_lm"]),
        ("kimi_mlx.sizing", ["mlx", "mlx_lm"]),
        ("kimi_mlx.cli", ["mlx_lm", "transformers"]),
        ("kimi_mlx.engine", ["mlx_lm", "transformers"]),
        ("kimi_mlx.session", ["mlx_lm", "transformers"]),
    ],
)
def test_light_packages_stay_light(package: str, banned: list[str]) -> None:
    """Import every module of a package in a new process; import-linter does not see side effects of an import."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} does not exist yet")
    walk = f"[m.name for m in pkgutil.iter_modules({package}.__path__, '{package}.')]" if "." in package else "[]"
    code = (
        f"import importlib, pkgutil, sys, {package}\nfor name in {walk}: importlib.import_module(name)\n"
        f"print(*sorted(set({banned}) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
