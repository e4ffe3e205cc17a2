"""Write a converted checkpoint, following a plan of kimi_mlx.weights.convert_plan.

A file gets its final name only when it is complete, and `config.json` is written last. A killed conversion resumes with
the file that it was writing, and no reader takes a folder without `config.json` for a model.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.files import rename_durably, write_atomically
from kimi_mlx.weights.conversion import Conversion
from kimi_mlx.weights.convert_folder import RECORD_NAME, check_folder, check_space, explain_disk_errors, lock_folder
from kimi_mlx.weights.converted_files import ConvertedFile, ConvertedWeight
from kimi_mlx.weights.file_layout import FileLayout, region_of
from kimi_mlx.weights.index import INDEX_NAME
from kimi_mlx.weights.requantize import Chunk, chunks, convert_chunk

ProgressCallback = Callable[[int, int], None]
"""Called with bytes written and total bytes."""


@dataclass(frozen=True)
class ConversionResult:
    """A finished conversion.

    Args:
        folder: output folder.
        files: number of weight files.
        files_before: number of these that an earlier run wrote.
        size_bytes: total bytes of the weight files.
        bits_per_weight: average number of bits, scales and biases included.
        seconds: duration of this run.
        relative_errors: kind of matrix -> norm of the error of its quantization divided by that of its values, weighted
            by importance if there is any; only of files that this run wrote with searched scales.
    """

    folder: Path
    files: int
    files_before: int
    size_bytes: int
    bits_per_weight: float
    seconds: float
    relative_errors: dict[str, float] = field(default_factory=dict)


def convert(
    conversion: Conversion, folder: Path, progress: ProgressCallback = lambda done, total: None
) -> ConversionResult:
    """Write the converted checkpoint, or the files that an earlier run did not finish.

    Args:
        conversion: planned conversion.
        folder: new or empty folder, or one with an unfinished run of the same conversion.
        progress: callback, at the start and after each chunk.

    Raises:
        UsageError: the folder contains other files.
        WeightsError: the disk is too small or fails, or another process uses the folder.
    """
    start = time.monotonic()
    check_folder(conversion, folder)
    check_space(conversion, folder)
    plan = conversion.plan
    layouts = {file.name: file.layout() for file in plan.files}
    missing = [file for file in plan.files if not _is_finished(folder / file.name, layouts[file.name])]
    total = sum(layout.size_bytes for layout in layouts.values())
    done = total - sum(layouts[file.name].size_bytes for file in missing)
    progress(done, total)
    errors: dict[str, np.ndarray] = {}
    with lock_folder(folder, conversion.record()), explain_disk_errors(conversion, folder):
        for file in missing:
            base = done

            def advance(written: int, base: int = base) -> None:
                progress(base + written, total)

            _write_file(conversion, file, layouts[file.name], folder / file.name, advance, errors)
            done += layouts[file.name].size_bytes
            progress(done, total)
        _finish(conversion, folder)
    before = len(plan.files) - len(missing)
    seconds = time.monotonic() - start
    relative = {kind: math.sqrt(error / values) for kind, (error, values) in errors.items() if values > 0}
    return ConversionResult(folder, len(plan.files), before, total, plan.bits_per_weight, seconds, relative)


def _is_finished(path: Path, layout: FileLayout) -> bool:
    """Return whether a file is finished; only complete files get their final name."""
    return path.is_file() and path.stat().st_size == layout.size_bytes


def _finish(conversion: Conversion, folder: Path) -> None:
    """Write the small files, the index and `config.json`; then remove partial files, and the record last."""
    for path in conversion.small_files:
        target = folder / path.relative_to(conversion.source)
        target.parent.mkdir(exist_ok=True)
        write_atomically(target, path.read_bytes())
    write_atomically(folder / INDEX_NAME, json.dumps(conversion.plan.index(), indent=1).encode())
    write_atomically(folder / "config.json", json.dumps(conversion.config, indent=1).encode())
    for partial in folder.glob("*.part"):
        partial.unlink()
    (folder / RECORD_NAME).unlink()


def _write_file(
    conversion: Conversion,
    file: ConvertedFile,
    layout: FileLayout,
    path: Path,
    advance: Callable[[int], None],
    errors: dict[str, np.ndarray],
) -> None:
    """Write one file chunk by chunk, and add up the errors of each kind; remove a partial file after an error."""
    reader, part = conversion.reader, path.with_name(path.name + ".part")
    searches = conversion.options.scales == "search"
    written = 0
    try:
        with part.open("wb") as stream:
            stream.write(layout.header)
            stream.flush()
            for weight in file.weights:
                importance = conversion.importance_of(weight)
                for chunk in chunks(weight):
                    converted = convert_chunk(reader, weight, chunk, searches, importance)
                    written += _write_chunk(stream.fileno(), layout, weight, chunk, converted.arrays)
                    if converted.squared_error is not None:
                        errors[weight.kind] = errors.get(weight.kind, np.zeros(2)) + converted.squared_error
                    advance(written)
            os.fsync(stream.fileno())
        rename_durably(part, path)
    finally:
        part.unlink(missing_ok=True)
        reader.close()
        mx.clear_cache()


def _write_chunk(
    handle: int, layout: FileLayout, weight: ConvertedWeight, chunk: Chunk, values: list[np.ndarray]
) -> int:
    """Write the arrays of a chunk; return the number of bytes."""
    copy = chunk.copies[0]
    for (name, array), value in zip(weight.arrays, values, strict=True):
        region = region_of(layout.starts[name], array, copy.member, copy.row, value.shape[1])
        region.write(handle, 0, np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    return sum(value.nbytes for value in values)
