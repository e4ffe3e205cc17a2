#!/usr/bin/env python3
"""Build the sdist and the wheel, and install the wheel with each installer on each Python that is here.

scripts/check_packages.py                        all Pythons from 3.10 to 3.14 that are found
scripts/check_packages.py 3.10 3.13              these only
scripts/check_packages.py --lowest 3.10          with the oldest allowed version of each direct dependency

It needs uv, and the package registry. Each installation is in a new folder that is removed at the end; kimi-mini must
answer in it. The size is that of the environment, without the Python that made it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
MINORS = ("3.10", "3.11", "3.12", "3.13", "3.14")
LIMIT_S = 900


def find_uv() -> str:
    """Return the path of uv: that of this environment, else the one on the path."""
    own = Path(sys.executable).with_name("uv")
    uv = str(own) if own.exists() else shutil.which("uv")
    if uv is None:
        sys.exit("error: there is no uv")
    return uv


UV = find_uv()


def find_python(minor: str) -> str | None:
    """Return a Python of a minor version: on the path (where a name may be a shim that fails), of pyenv, or of uv."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{minor}.*/bin/python3"))
    candidates = [shutil.which(f"python{minor}"), *map(str, pyenv)]
    found = subprocess.run([UV, "python", "find", minor], capture_output=True, text=True)
    candidates.append(found.stdout.strip() or None)
    for path in candidates:
        code = f"import sys; sys.exit(sys.version_info[:2] != {tuple(map(int, minor.split('.')))})"
        if path is not None and subprocess.run([path, "-c", code], capture_output=True).returncode == 0:
            return path
    return None


def run(*command: str, **variables: str) -> str:
    """Run a command and return its output; exit with its errors if it fails."""
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, env={**plain, **variables}, cwd="/", capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel; the order of the lines in RECORD does not count."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    return {
        name: b"\n".join(sorted(data.split())) if name.endswith("/RECORD") else data for name, data in files.items()
    }


def build(folder: Path) -> Path:
    """Build the sdist, a wheel from it and one from the clone; return the wheel if both are equal."""
    run(UV, "build", "--quiet", "--out-dir", str(folder / "from-sdist"), str(ROOT))
    run(UV, "build", "--quiet", "--wheel", "--out-dir", str(folder / "from-clone"), str(ROOT))
    wheel, other = (next((folder / name).glob("*.whl")) for name in ("from-sdist", "from-clone"))
    if contents(wheel) != contents(other):
        sys.exit(f"error: {wheel} and {other} differ")
    names = set(contents(wheel))
    for model in ("kimi-mini", "kimi-mini-vl"):
        if f"kimi_mlx/models/{model}/model.safetensors" not in names:
            sys.exit(f"error: {model} is missing in {wheel}")
    sdist = next((folder / "from-sdist").glob("*.tar.gz"))
    print(f"sdist {sdist.stat().st_size / 1e6:.1f} MB, wheel {wheel.stat().st_size / 1e6:.1f} MB, the same from both")
    return wheel


def with_uv_tool(python: str, wheel: str, folder: Path) -> tuple[Path, Path]:
    """Install with `uv tool install`; return the program and the environment."""
    folders = {"UV_TOOL_DIR": str(folder / "tools"), "UV_TOOL_BIN_DIR": str(folder / "bin")}
    run(UV, "tool", "install", "--quiet", "--python", python, wheel, **folders)
    return folder / "bin" / "kimi-mlx", folder / "tools" / "kimi-mlx"


def with_pipx(python: str, wheel: str, folder: Path) -> tuple[Path, Path]:
    """Install with pipx, which uv runs; return the program and the environment."""
    folders = {"PIPX_HOME": str(folder / "pipx"), "PIPX_BIN_DIR": str(folder / "bin"), "PIPX_MAN_DIR": str(folder)}
    run(UV, "tool", "run", "--quiet", "pipx", "install", "--quiet", "--python", python, wheel, **folders)
    return folder / "bin" / "kimi-mlx", folder / "pipx" / "venvs" / "kimi-mlx"


def with_pip(python: str, wheel: str, folder: Path) -> tuple[Path, Path]:
    """Install with pip into a virtual environment; return the program and the environment."""
    run(python, "-m", "venv", str(folder / "venv"))
    run(str(folder / "venv" / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", wheel)
    return folder / "venv" / "bin" / "kimi-mlx", folder / "venv"


def with_lowest_versions(python: str, wheel: str, folder: Path) -> tuple[Path, Path]:
    """Install the oldest allowed direct dependencies; return the program and the environment."""
    run(UV, "venv", "--quiet", "--python", python, str(folder / "venv"))
    interpreter = str(folder / "venv" / "bin" / "python")
    project = str(ROOT / "pyproject.toml")
    run(UV, "pip", "install", "--quiet", "--resolution", "lowest-direct", "--python", interpreter, "-r", project)
    run(UV, "pip", "install", "--quiet", "--no-deps", "--python", interpreter, wheel)
    return folder / "venv" / "bin" / "kimi-mlx", folder / "venv"


IMPORT_ALL = """
import importlib, pkgutil, kimi_mlx
EXTRAS = ("av", "mcp", "mcp_types", "pillow_heif", "matplotlib", "mlx_vlm")
for module in pkgutil.walk_packages(kimi_mlx.__path__, "kimi_mlx."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name in EXTRAS, (module.name, error)
"""
"""Code that imports all modules: syntax and types that an older Python does not have are errors."""


def size_bytes(folder: Path) -> int:
    """Return the size of all files, with bytecode left out, which pip and pipx write and uv does not."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files if path.suffix != ".pyc")


def check(install: Callable[[str, str, Path], tuple[Path, Path]], python: str, wheel: Path) -> str:
    """Install the wheel, let kimi-mini answer, and return the figures."""
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        program, environment = install(python, str(wheel), Path(name))
        seconds = time.monotonic() - began
        home = {"HOME": name, "XDG_STATE_HOME": name, "XDG_DATA_HOME": name}
        versions = json.loads(run(str(program), "--version", "--json", **home))
        answer = json.loads(run(str(program), "chat", "-p", "What are you?", "--json", **home))
        if "kimi-mini" not in answer["text"] or versions["commit"] is None:
            sys.exit(f"error: {versions} {answer}")
        run(str(environment / "bin" / "python"), "-c", IMPORT_ALL, **home)
        wrong = subprocess.run([str(program), "chat", "--nonsense"], capture_output=True, text=True)
        if wrong.returncode != 2 or "No such option" not in wrong.stderr:
            sys.exit(f"error: {wrong}")
        code = f"import runpy; print(runpy.run_path({str(ROOT / 'scripts' / 'make_cli_docs.py')!r})['page'](), end='')"
        page = run(str(environment / "bin" / "python"), "-c", code, **home)
        if install is not with_lowest_versions and page != (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"):
            sys.exit("error: the help of the commands is not that of docs/cli.md")
        packages = len(list(environment.rglob("*.dist-info")))
        return (
            f"Python {versions['python']:8} MLX {versions['mlx']}  {packages} packages, "
            f"{size_bytes(environment) / 1e6:.0f} MB, {seconds:.0f} s"
        )


def main() -> None:
    """Run the checks, and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("minors", nargs="*", default=MINORS, metavar="VERSION")
    parser.add_argument("--lowest", action="store_true", help="oldest allowed versions of the direct dependencies")
    arguments = parser.parse_args()
    installers = {"uv tool": with_uv_tool, "pipx": with_pipx, "pip": with_pip}
    if arguments.lowest:
        installers = {"lowest versions": with_lowest_versions}
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        for minor in arguments.minors:
            python = find_python(minor)
            if python is None:
                print(f"Python {minor}: not found")
                continue
            for name, install in installers.items():
                print(f"{name:16}{check(install, python, wheel)}", flush=True)


if __name__ == "__main__":
    main()
