"""Training checkpoints: parameters, optimizer state and progress in one folder, replaced atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx

from scripts.mini.model import Parameters

FILE = "checkpoint.safetensors"


def save(folder: Path, parameters: Parameters, optimizer: Parameters, progress: dict[str, Any]) -> None:
    """Write everything that is needed to resume the run."""
    tensors = {f"p/{name}": value for name, value in parameters.items()} | {
        f"o/{name}": value for name, value in optimizer.items()
    }
    part = folder / f"part-{FILE}"
    mx.save_safetensors(str(part), tensors, {"progress": json.dumps(progress)})
    os.replace(part, folder / FILE)


def load(folder: Path) -> tuple[Parameters, Parameters, dict[str, Any]] | None:
    """Return parameters, optimizer state and progress, or None if nothing was saved."""
    path = folder / FILE
    if not path.exists():
        return None
    loaded: Any = mx.load(str(path), return_metadata=True)
    tensors, metadata = loaded
    parameters = {name[2:]: value for name, value in tensors.items() if name.startswith("p/")}
    optimizer = {name[2:]: value for name, value in tensors.items() if name.startswith("o/")}
    return parameters, optimizer, json.loads(metadata["progress"])
