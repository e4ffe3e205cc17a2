"""Train, export and evaluate kimi-mini-vl, the toy model with vision bundled with kimi-mlx.

    python scripts/train_mini_vl.py                      train on two processes, then export and evaluate
    python scripts/train_mini_vl.py --export             write the newest checkpoint of a run as the shipped model
    python scripts/train_mini_vl.py --eval --count 100   exact match per task of the shipped model

The text model starts from kimi-mini's shipped weights. An interrupted run resumes from its last checkpoint, unless
`--no-resume` is given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main(
    minutes: Annotated[float, typer.Option(help="Training time; the schedule is scaled to it.")] = 56.0,
    ranks: Annotated[int, typer.Option(help="Number of data-parallel processes, one core each.")] = 2,
    model: Annotated[
        Path | None, typer.Option(help="Folder to export to and evaluate; default: the package's.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Checkpoints and logs of the run.")] = ROOT / "build" / "kimi-mini-vl",
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate, shared by Muon and AdamW.")] = 3e-3,
    resume: Annotated[bool, typer.Option(help="Resume from the newest checkpoint in the folder.")] = True,
    export: Annotated[
        bool, typer.Option("--export", help="Only write the newest checkpoint as the shipped model.")
    ] = False,
    evaluate: Annotated[bool, typer.Option("--eval", help="Only evaluate the shipped model.")] = False,
    count: Annotated[int, typer.Option(help="Number of new pictures or dialogues per row of the evaluation.")] = 100,
    examples: Annotated[bool, typer.Option(help="Show one wrong answer per row.")] = False,
) -> None:
    """Train kimi-mini-vl, then export and evaluate it."""
    from scripts.mini import launch
    from scripts.mini.training import Settings
    from scripts.mini.vision_export import SHIPPED
    from scripts.mini.vision_export import export as write_model
    from scripts.mini.vision_training import TEXT_MODEL

    target = model or SHIPPED
    if not evaluate and not export:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            launch.remove_run(folder)
        settings = Settings(str(folder), str(TEXT_MODEL), minutes, learning_rate, seed="kimi-mini-vl", vision=True)
        launch.train(settings, ranks)
    if not evaluate:
        written = write_model(folder, target)
        typer.echo(f"wrote {target} ({written / 1e6:.1f} MB)", err=True)
    if not export:
        launch.evaluate(target, count, examples, module="scripts.mini.vision_evaluate")


if __name__ == "__main__":
    typer.run(main)
