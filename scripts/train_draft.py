"""Train the draft model of kimi-mini, which is bundled with kimi-mlx.

    python scripts/train_draft.py                 train on kimi-mini's answers and states
    python scripts/train_draft.py --minutes 2 --samples 500 --folder build/draft

Then `kimi-mlx bench --draft build/draft` measures it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHIPPED = ROOT / "kimi_mlx" / "models" / "kimi-mini-draft"


def main(
    minutes: Annotated[float, typer.Option(help="Training time; the schedule is scaled to it.")] = 15.0,
    samples: Annotated[int, typer.Option(help="Number of dialogues with kimi-mini.")] = 6000,
    folder: Annotated[Path, typer.Option(help="Folder to export to.")] = SHIPPED,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 3e-3,
    start: Annotated[Path | None, typer.Option(help="Folder of a draft model to continue from.")] = None,
) -> None:
    """Train and export the draft model."""
    from scripts.mini.draft_training import Settings
    from scripts.mini.launch import fast_environment

    settings = Settings(
        str(folder.resolve()), minutes, samples, learning_rate, None if start is None else str(start.resolve())
    )
    command = [sys.executable, "-m", "scripts.mini.draft_training", json.dumps(asdict(settings))]
    subprocess.run(command, cwd=ROOT, env=fast_environment(), check=True)


if __name__ == "__main__":
    typer.run(main)
