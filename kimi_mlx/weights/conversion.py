"""A planned conversion: its source, options and output files. Nothing is written here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kimi_mlx.errors import UsageError
from kimi_mlx.model.config import parse_config, read_json
from kimi_mlx.weights.convert_config import converted_config
from kimi_mlx.weights.convert_options import ConvertOptions
from kimi_mlx.weights.convert_plan import plan_conversion
from kimi_mlx.weights.converted_files import ConversionPlan, ConvertedWeight
from kimi_mlx.weights.importance import Importance, norm_digest
from kimi_mlx.weights.index import require_small_files
from kimi_mlx.weights.reader import CheckpointReader, open_checkpoint

RECORD_FORMAT = 1
"""Version of the record in the folder of an unfinished conversion."""

LICENCE_FILES = ("LICENSE*", "LICENCE*", "THIRD_PARTY_NOTICES*")
"""Patterns of files that are copied from the source beside those of the model."""


@dataclass(frozen=True)
class Conversion:
    """A planned conversion.

    Args:
        source: folder of the source checkpoint.
        digest: hash of the source's configuration, and of the names, sizes and modification times of its files.
        options: options of the command.
        config: contents of the new `config.json`.
        plan: the new files.
        small_files: files to copy.
        reader: reader of the source.
        importance: importance of the columns; None if all are equal.
    """

    source: Path
    digest: str
    options: ConvertOptions
    config: dict[str, Any]
    plan: ConversionPlan
    small_files: tuple[Path, ...]
    reader: CheckpointReader
    importance: Importance | None = None

    def importance_of(self, weight: ConvertedWeight) -> np.ndarray | None:
        """Return the importance of the columns of a weight, (members, columns); None if all are equal."""
        is_quantized = not weight.is_copied and weight.plan.quantization is not None
        return None if self.importance is None or not is_quantized else self.importance.of(weight)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return self.plan.size_bytes + sum(file.stat().st_size for file in self.small_files)

    def record(self) -> dict[str, Any]:
        """Return the record of the conversion; a conversion resumes only if its record is equal."""
        source = {"folder": str(self.source.resolve()), "digest": self.digest}
        return {"format": RECORD_FORMAT, "source": source, "options": self.options.record()}


def open_conversion(source: Path, options: ConvertOptions, importance: Importance | None = None) -> Conversion:
    """Read the headers of a checkpoint and plan its conversion.

    Raises:
        ConfigError: unsupported model.
        WeightsError: missing, unknown or wrongly stored tensors, or the importance of another model.
        UsageError: options that contradict each other or the source, or have no effect.
    """
    raw = read_json(source / "config.json")
    config = parse_config(raw, str(source / "config.json"))
    reader = open_checkpoint(source, replace(config, vision=None) if options.no_vision else config)
    plan = plan_conversion(reader.checkpoint, options, has_prefix="text_config" in raw)
    if importance is not None:
        importance.check(plan.weights)
        importance.check_digest(norm_digest(reader), str(source))
        if all(weight.is_copied or weight.plan.quantization is None for weight in plan.weights):
            raise UsageError(
                "--importance has no effect: every matrix is copied unchanged or stays float",
                hint="omit it, or choose a --preset with fewer bits",
            )
        options = replace(options, importance=importance.digest)
    new_config, small_files = converted_config(raw, plan), _small_files(source)
    return Conversion(source, _digest(source, reader), options, new_config, plan, small_files, reader, importance)


def _digest(source: Path, reader: CheckpointReader) -> str:
    """Return a hash that identifies a checkpoint and its state, without reading its tensors."""
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for file in sorted({info.file for info in reader.checkpoint.tensors.values()}):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:40]


def _small_files(source: Path) -> tuple[Path, ...]:
    """Return the files to copy unchanged."""
    licences = {path for pattern in LICENCE_FILES for path in source.glob(pattern) if path.is_file()}
    files = {source / name for name in require_small_files(source) if name != "config.json"}
    return tuple(sorted(files | licences))
