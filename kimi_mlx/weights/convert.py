"""Conversion of a checkpoint to MLX's affine layout: the plan of kimi_mlx.weights.convert_plan, carried out.

It streams: a matrix is read, computed and written in pieces of whole rows, so that memory does not depend on the size
of the model. Each file appears under its name only when it is whole, and `config.json` comes last: a conversion that
was killed goes on with the file it was at, and a folder without `config.json` is no model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.files import is_disk_full, rename_durably, write_atomically
from kimi_mlx.model.config import parse_config, read_json
from kimi_mlx.model.names import SourceMatrix
from kimi_mlx.parallel.placement import Range
from kimi_mlx.units import format_bytes
from kimi_mlx.weights.assemble import MLX_TYPES
from kimi_mlx.weights.checkpoint import MatrixField, MatrixFormat
from kimi_mlx.weights.convert_plan import (
    ConversionPlan,
    ConvertedFile,
    ConvertOptions,
    WeightConversion,
    converted_config,
    plan_conversion,
)
from kimi_mlx.weights.file_layout import FileLayout
from kimi_mlx.weights.index import INDEX_NAME
from kimi_mlx.weights.layer_plan import SliceCopy, TensorSlice
from kimi_mlx.weights.reader import CheckpointReader, open_checkpoint

PIECE_VALUES = 1 << 24
"""Values that are worked on at a time, as far as rows allow it: 64 MB in float32. An expert of K2 has 14.7 million."""

RECORD_NAME = ".convert.json"
"""What is being converted into a folder, as long as it is not finished."""
RECORD_FORMAT = 1

SMALL_FILES = ("*.json", "*.jinja", "tiktoken.model", "tokenizer*", "LICENSE*", "THIRD_PARTY_NOTICES*")
"""Copied from the source, apart from its `config.json` and indices; never Python code."""

ProgressCallback = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


@dataclass(frozen=True)
class Conversion:
    """A conversion that is planned and not begun.

    Args:
        source: folder of the checkpoint.
        digest: of its configuration, and of names, sizes and times of its files.
        options: what was asked for.
        config: contents of the new `config.json`.
        plan: the new files.
        small_files: what is copied.
        reader: of the source.
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
        """What must be equal for a conversion to go on."""
        source = {"folder": str(self.source.resolve()), "digest": self.digest}
        return {"format": RECORD_FORMAT, "source": source, "options": asdict(self.options)}


@dataclass(frozen=True)
class ConversionResult:
    """A finished conversion.

    Args:
        folder: of the result.
        files: number of weight files.
        files_before: how many of them were there already, from an earlier run.
        size_bytes: of the weight files.
        bits_per_weight: scales and biases included.
        seconds: this run took.
    """

    folder: Path
    files: int
    files_before: int
    size_bytes: int
    bits_per_weight: float
    seconds: float


def open_conversion(source: Path, options: ConvertOptions) -> Conversion:
    """Read the headers of a checkpoint and plan what becomes of it.

    Raises:
        ConfigError: a model that we do not have.
        WeightsError: missing, unknown or wrongly stored tensors.
        UsageError: options that contradict each other or the source.
    """
    raw = read_json(source / "config.json")
    reader = open_checkpoint(source, parse_config(raw, str(source / "config.json")))
    plan = plan_conversion(reader.checkpoint, options, has_prefix="text_config" in raw)
    config = converted_config(raw, plan)
    return Conversion(source, _digest(source, reader), options, config, plan, _small_files(source), reader)


def convert(
    conversion: Conversion, folder: Path, progress: ProgressCallback = lambda done, total: None
) -> ConversionResult:
    """Write the converted checkpoint, or what an earlier run has left of it to do.

    Args:
        conversion: the plan.
        folder: new or empty, or what an earlier run of the same conversion has left.
        progress: called at the start and after each piece.

    Raises:
        UsageError: the folder holds something else.
        WeightsError: the disk is too small or fails, or another process is at it.
    """
    start = time.monotonic()
    check_folder(conversion, folder)
    check_space(conversion, folder)
    plan = conversion.plan
    layouts = {file.name: file.layout() for file in plan.files}
    missing = [file for file in plan.files if not _is_there(folder / file.name, layouts[file.name])]
    total = sum(layout.size_bytes for layout in layouts.values())
    done = total - sum(layouts[file.name].size_bytes for file in missing)
    progress(done, total)
    with _claimed(folder, conversion.record()), _explained(conversion, folder):
        for file in missing:
            base = done

            def advance(written: int, base: int = base) -> None:
                progress(base + written, total)

            _write_file(conversion.reader, file, layouts[file.name], folder / file.name, advance)
            done += layouts[file.name].size_bytes
            progress(done, total)
        _finish(conversion, folder)
    before = len(plan.files) - len(missing)
    seconds = time.monotonic() - start
    return ConversionResult(folder, len(plan.files), before, total, plan.bits_per_weight, seconds)


def check_folder(conversion: Conversion, folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier run of the same conversion.

    Raises:
        UsageError: it does; both conversions are named.
    """
    try:
        present = {path.name for path in folder.iterdir()} - {".DS_Store"}
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"`{folder}` cannot be written into: {error.strerror}", hint="choose another folder") from None
    if all(_is_part_of_record(name) for name in present):
        return
    if RECORD_NAME not in present:
        what = "holds a model already" if "config.json" in present else f"is not empty: it has `{min(present)}`"
        raise UsageError(f"`{folder}` {what}", hint="choose a new folder; nothing there has been touched")
    found, wanted = _read_record(folder), conversion.record()
    if found != wanted:
        raise UsageError(
            f"`{folder}` holds an unfinished conversion of {_in_words(found)}; asked for is {_in_words(wanted)}",
            hint="go on with the same source and options, choose a new folder, or remove this one",
        )


def _is_part_of_record(name: str) -> bool:
    """Whether a process was killed while it wrote the record, its first file."""
    return name.startswith(RECORD_NAME + ".") and name.endswith(".part")


def check_space(conversion: Conversion, folder: Path) -> None:
    """Refuse what the disk cannot hold.

    Raises:
        WeightsError: with both numbers.
    """
    needed = conversion.size_bytes - _present_bytes(conversion, folder)
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    if needed > free:
        raise WeightsError(
            f"the result needs {format_bytes(needed)} in `{folder}`, but its disk has {format_bytes(free)} free",
            hint="free some space, choose another disk, or fewer --bits",
        )


def _present_bytes(conversion: Conversion, folder: Path) -> int:
    """Bytes of finished files, and of the unfinished one, whose space is used again."""
    names = [name for file in conversion.plan.files for name in (file.name, file.name + ".part")]
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())


def _is_there(path: Path, layout: FileLayout) -> bool:
    """Whether a file is finished: only what is full and on the disk gets its name."""
    return path.is_file() and path.stat().st_size == layout.size_bytes


@contextmanager
def _claimed(folder: Path, record: dict[str, Any]) -> Generator[None]:
    """Keep other processes out of a folder, and write down what is being done there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RECORD_NAME).exists():
            write_atomically(folder / RECORD_NAME, json.dumps(record, indent=1).encode())
        handle = os.open(folder / RECORD_NAME, os.O_RDWR)
    except OSError as error:
        raise WeightsError(f"`{folder}` cannot be written: {error.strerror}", hint="choose another folder") from error
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WeightsError(f"another process is converting into `{folder}`", hint="wait for it, or end it") from None
    except OSError:
        pass  # a disk of another machine may have no locks


@contextmanager
def _explained(conversion: Conversion, folder: Path) -> Generator[None]:
    """Say what to do when the disk fails."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise WeightsError(f"`{folder}` cannot be written: {error.strerror}", hint="check its disk") from error
        needed = conversion.size_bytes - _present_bytes(conversion, folder)
        free = shutil.disk_usage(folder).free
        raise WeightsError(
            f"the disk is full: the rest needs {format_bytes(needed)} in `{folder}`, {format_bytes(free)} are free",
            hint="free some space and type the same command again: it goes on where it was",
        ) from error


def _finish(conversion: Conversion, folder: Path) -> None:
    """The small files, then those that make it a model; what killed processes have left, and then the record, go."""
    for path in conversion.small_files:
        write_atomically(folder / path.name, path.read_bytes())
    write_atomically(folder / INDEX_NAME, json.dumps(conversion.plan.index(), indent=1).encode())
    write_atomically(folder / "config.json", json.dumps(conversion.config, indent=1).encode())
    for left in folder.glob("*.part"):
        left.unlink()
    (folder / RECORD_NAME).unlink()


def _write_file(
    reader: CheckpointReader, file: ConvertedFile, layout: FileLayout, path: Path, advance: Callable[[int], None]
) -> None:
    """Write one file piece by piece; what is left of it after an error is removed."""
    part = path.with_name(path.name + ".part")
    written = 0
    try:
        with part.open("wb") as stream:
            stream.write(layout.header)
            for output in file.outputs:
                for piece in _pieces(output):
                    written += _write_piece(stream, layout, output, piece, _convert_chunk(reader, output, piece))
                    advance(written)
            stream.flush()
            os.fsync(stream.fileno())
        rename_durably(part, path)
    finally:
        part.unlink(missing_ok=True)
        reader.close()
        mx.clear_cache()


@dataclass(frozen=True)
class _Piece:
    """Some rows of a source's matrix.

    Args:
        path: of the matrix.
        member: of a stack that is stored as one.
        rows: which; None if all.
        row: where they begin in the output, its stack seen as one tall matrix.
    """

    path: str
    member: int | None
    rows: Range | None
    row: int


def _pieces(output: WeightConversion) -> Iterator[_Piece]:
    """What an output is made of, in pieces of whole rows and about PIECE_VALUES values."""
    source = output.source
    if source.heads is not None or len(source.shape) == 1:
        yield _Piece(source.paths[0], None, None, 0)
        return
    *leading, rows, columns = source.shape
    height = max(1, PIECE_VALUES // columns)
    members = range(leading[0]) if leading else (None,)
    row = 0
    for path in source.paths:
        for member in members:
            for start in range(0, rows, height):
                stop = min(rows, start + height)
                yield _Piece(path, member, Range(start, stop), row)
                row += stop - start


def _write_piece(
    stream: BinaryIO, layout: FileLayout, output: WeightConversion, piece: _Piece, values: list[np.ndarray]
) -> int:
    """Write a piece of each array of an output; returns bytes."""
    for array, value in zip(output.arrays, values, strict=True):
        row_bytes = array.size_bytes // math.prod(array.shape[:-1])
        stream.seek(layout.starts[array.name] + piece.row * row_bytes)
        stream.write(np.ascontiguousarray(value).data)
    return sum(value.nbytes for value in values)


def _convert_chunk(reader: CheckpointReader, output: WeightConversion, piece: _Piece) -> list[np.ndarray]:
    """The arrays of a piece, as they are stored in the output."""
    matrix = reader.checkpoint.matrix(piece.path, output.source.suffix, output.source.shape)
    fields = [_read(reader, output.source, piece, field) for field in matrix.fields]
    if output.is_copied:
        return fields
    return _encode(output, _by_heads(output, _decode(matrix, fields)))


def _read(reader: CheckpointReader, source: SourceMatrix, piece: _Piece, field: MatrixField) -> np.ndarray:
    """A field of a piece; bfloat16 as uint16."""
    matrix = SourceMatrix((piece.path,), source.shape, suffix=source.suffix)
    window = TensorSlice(matrix, field.per, field.values, rows=piece.rows)
    box = window.shape3(reader.checkpoint.tensors[field.tensors[0]].shape)
    return reader.read_slice(SliceCopy(field, window, box, 0, 0))[piece.member or 0]


def _decode(matrix: MatrixFormat, fields: list[np.ndarray]) -> mx.array:
    """The values of a matrix, float32."""
    arrays = [
        mx.array(np.ascontiguousarray(value)).view(MLX_TYPES[field.dtype])
        for field, value in zip(matrix.fields, fields, strict=True)
    ]
    if matrix.quantization is None:
        return arrays[0].astype(mx.float32)
    weight, scales, biases = arrays
    quantization = matrix.quantization
    return mx.dequantize(
        weight,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        group_size=quantization.group_size,
        bits=quantization.bits,
    )


def _by_heads(output: WeightConversion, values: mx.array) -> mx.array:
    """Of `kv_b_proj` the keys, (heads, latent, nope), or the values, (heads, v, latent); other matrices as they are."""
    if output.source.heads is None:
        return values
    heads, first, end = output.source.heads
    part = values.reshape(heads, -1, values.shape[-1])[:, first:end]  # (heads, rows, latent)
    return part.swapaxes(1, 2) if output.is_transposed else part


def _encode(output: WeightConversion, values: mx.array) -> list[np.ndarray]:
    """Values in the output's types, quantized in float32.

    They are rounded to the type of the scales before: a group's bias is one of its values, and so is exact.
    """
    dtype = MLX_TYPES[output.arrays[-1].dtype]
    if output.quantization is None:
        arrays = [values.astype(dtype)]
    else:
        rounded = mx.contiguous(values.astype(dtype).astype(mx.float32))
        weight, *rest = mx.quantize(rounded, output.quantization.group_size, output.quantization.bits)
        arrays = [weight, *(array.astype(dtype) for array in rest)]
    return [np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array) for array in arrays]


def _digest(source: Path, reader: CheckpointReader) -> str:
    """What tells a checkpoint from another, or from its own later state, without reading it."""
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for file in sorted({info.file for info in reader.checkpoint.tensors.values()}):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:40]


def _small_files(source: Path) -> tuple[Path, ...]:
    """What is copied as it is."""
    found = {path for pattern in SMALL_FILES for path in source.glob(pattern) if path.is_file()}
    unwanted = (".index.json", ".py", ".safetensors")
    return tuple(
        path
        for path in sorted(found)
        if path.name != "config.json" and not path.name.startswith(".") and not path.name.endswith(unwanted)
    )


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD_NAME).read_bytes())
        return {name: record[name] for name in ("format", "source", "options")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"`{folder / RECORD_NAME}` cannot be read: {error!r}", hint="choose a new folder, or remove this one"
        ) from error


def _in_words(record: dict[str, Any]) -> str:
    """SourceMatrix and options, such as `/k2 (1f0c5a3b) with bits 4, group_size 64`."""
    options = ", ".join(f"{name} {value}" for name, value in record["options"].items() if value is not None)
    source = record["source"]
    return f"`{source['folder']}` ({source['digest'][:8]}) with {options or 'no options'}"
