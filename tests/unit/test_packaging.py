"""The packages that kimi-mlx declares are those that it imports. scripts/check_packages.py builds and installs it."""

from __future__ import annotations

import re
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
IMPORT = re.compile(r"^\s*(?:from|import) ([a-zA-Z_]\w*)", re.MULTILINE)
EXTRAS = {"pillow-heif": "heic", "av": "video", "matplotlib": "plot", "mcp": "mcp"}
"""Packages that only an extra installs, and the extra."""
NOT_DECLARED = {
    "mlx-vlm": "only `kimi-mlx bench --against mlx-vlm` uses it, and says how to install it",
    "mlx-cpu": "part of mlx",
    "pydantic-core": "part of pydantic",
    "mcp-types": "part of mcp",
    "mlx-metal": "part of mlx",
}


def requirements(extra: str | None = None) -> set[str]:
    """Return the names of the required packages, or those of an extra."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return {normalize(Requirement(text).name) for text in texts}


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_imported_packages_are_declared() -> None:
    """A package that only comes with another one may be missing after an update of that one."""
    declared = requirements() | set(EXTRAS) | set(NOT_DECLARED)
    of_module = packages_distributions()
    missing: dict[str, str] = {}
    for path in (ROOT / "kimi_mlx").rglob("*.py"):
        for module in set(IMPORT.findall(path.read_text(encoding="utf-8"))) - sys.stdlib_module_names - {"kimi_mlx"}:
            names = {normalize(name) for name in of_module.get(module, [])}
            if names and not names & declared:
                missing[module] = f"{path.relative_to(ROOT)}: {', '.join(names)}"
    assert not missing


def test_extras() -> None:
    for package, extra in EXTRAS.items():
        assert package in requirements(extra) - requirements()


def test_metadata() -> None:
    metadata = distribution("kimi-mlx").metadata
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    (script,) = distribution("kimi-mlx").entry_points.select(name="kimi-mlx")
    assert callable(script.load())
