"""A planned conversion: its source, options and output files. Nothing is written here."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kimi_mlx.model.config import parse_config, read_json
from kimi_mlx.weights.convert_config import converted_config
from kimi_mlx.weights.convert_options import ConvertOptions
from kimi_mlx.weights.convert_plan import plan_conversion
from kimi_mlx.weights.converted_files import ConversionPlan
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
    """

    source: Path
    digest: str
    options: ConvertOptions
    config: dict[str, Any]
    plan: ConversionPlan
    small_files: tuple[Path, ...]
    reader: CheckpointReader

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return self.plan.size_bytes + sum(file.stat().st_size for file in self.small_files)

    def record(self) -> dict[str, Any]:
        """Return the record of the conversion; a conversion resumes only if its record is equal."""
        source = {"folder": str(self.source.resolve()), "digest": self.digest}
        options = asdict(self.options)
        if not options["no_vision"]:
            del options["no_vision"]  # earlier versions did not have it
        return {"format": RECORD_FORMAT, "source": source, "options": options}


def open_conversion(source: Path, options: ConvertOptions) -> Conversion:
    """Read the headers of a checkpoint and plan its conversion.

    Raises:
        ConfigError: unsupported model.
        WeightsError: missing, unknown or wrongly stored tensors.
        UsageError: options that contradict each other or the source.
    """
    raw = read_json(source / "config.json")
    config = parse_config(raw, str(source / "config.json"))
    reader = open_checkpoint(source, replace(config, vision=None) if options.no_vision else config)
    plan = plan_conversion(reader.checkpoint, options, has_prefix="text_config" in raw)
    new_config = converted_config(raw, plan)
    return Conversion(source, _digest(source, reader), options, new_config, plan, _small_files(source), reader)


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
