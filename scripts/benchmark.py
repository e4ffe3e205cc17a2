#!/usr/bin/env python3
"""`kimi-mlx bench` from this folder, in the environment that `scripts/demo` creates: see docs/benchmark.md."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"


def main() -> None:
    """Run the command with .venv's Python, if there is one."""
    python = ENVIRONMENT / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
        os.execv(python, [str(python), __file__, *sys.argv[1:]])
    # so that processes started by the benchmark find the package
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.path.insert(0, str(ROOT))
    try:
        from kimi_mlx.cli.app import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"error: the package `{error.name}` is missing\nhint: run `scripts/demo` once to create .venv")
    sys.argv[:1] = ["kimi-mlx", "bench"]
    run()


if __name__ == "__main__":
    main()
