"""Train, export and evaluate kimi-mini, the toy model bundled with kimi-mlx.

    python scripts/train_mini.py                      train on two processes, then export and evaluate
    python scripts/train_mini.py --minutes 10         the same recipe, shortened to ten minutes
    python scripts/train_mini.py --export             write the newest checkpoint of a run as the shipped model
    python scripts/train_mini.py --eval --count 100   exact match per task of the shipped model

An interrupted run resumes from its last checkpoint, unless `--no-resume` is given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main(
    minutes: Annotated[float, typer.Option(help="Training time; the schedule is scaled to it.")] = 85.0,
    ranks: Annotated[int, typer.Option(help="Number of data-parallel processes, one core each.")] = 2,
    model: Annotated[
        Path | None, typer.Option(help="Folder to export to and evaluate; default: the package's.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Checkpoints and logs of the run.")] = ROOT / "build" / "kimi-mini",
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate, shared by Muon and AdamW.")] = 3e-3,
    muon: Annotated[bool, typer.Option(help="MuonClip for the matrices; --no-muon trains with AdamW alone.")] = True,
    resume: Annotated[bool, typer.Option(help="Resume from the newest checkpoint in the folder.")] = True,
    export: Annotated[
        bool, typer.Option("--export", help="Only write the newest checkpoint as the shipped model.")
    ] = False,
    evaluate: Annotated[bool, typer.Option("--eval", help="Only evaluate the shipped model.")] = False,
    count: Annotated[int, typer.Option(help="Number of new dialogues per row of the evaluation.")] = 100,
    examples: Annotated[bool, typer.Option(help="Show one wrong answer per row.")] = False,
) -> None:
    """Train kimi-mini, then export and evaluate it."""
    from scripts.mini import launch
    from scripts.mini.export import SHIPPED
    from scripts.mini.export import export as write_model
    from scripts.mini.training import Settings

    target = model or SHIPPED
    vocabulary = folder / "vocabulary"
    if not evaluate and not export:
        if not resume:
            launch.remove_run(folder)
        launch.prepare(folder, vocabulary)
        launch.train(Settings(str(folder), str(vocabulary), minutes, learning_rate, muon), ranks)
    if not evaluate:
        written = write_model(folder, vocabulary, target)
        typer.echo(f"wrote {target} ({written / 1e6:.1f} MB)", err=True)
    if not export:
        launch.evaluate(target, count, examples)


if __name__ == "__main__":
    typer.run(main)
