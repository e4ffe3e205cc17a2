"""Measure the importance of a model's inputs and write the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from kimi_mlx.cli.output import load_progress
from kimi_mlx.cli.quality_inputs import TextOptions
from kimi_mlx.cli.quality_models import QualityModel, tokenize
from kimi_mlx.errors import UsageError
from kimi_mlx.quality.activations import record_inputs
from kimi_mlx.quality.windows import TokenWindows
from kimi_mlx.weights.importance import norm_digest, write_importance


def check_output(path: Path) -> None:
    """Check before the work that a file can be written.

    Raises:
        UsageError: it is a folder, or its folder does not exist or is read-only.
    """
    if path.is_dir():
        raise UsageError(f"`{path}` is a folder", hint="give the name of a file, such as `k2.importance.safetensors`")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder of `{path}` does not exist", hint="create it, or choose another file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"the folder of `{path}` is read-only", hint="choose a file in another folder")


def measure_importance(
    model: QualityModel, texts: Sequence[str], options: TextOptions, path: Path, is_quiet: bool
) -> TokenWindows:
    """Run texts through a model, and write its importance file.

    Raises:
        KimiMlxError: the texts or the model cannot be used.
        OSError: the disk is full or fails.
    """
    windows = tokenize(model, texts, options)
    with load_progress("measuring", is_quiet) as progress:
        recorder = record_inputs(model.model, windows.windows, progress)
    metadata = {
        "model": model.name,
        "weights": norm_digest(model.model.reader),
        "tokens": str(windows.num_tokens),
        "text": hashlib.sha256(repr(windows.windows).encode()).hexdigest(),
        "prompt": options.prompt,
    }
    write_importance(path, recorder.arrays, metadata)
    return windows
