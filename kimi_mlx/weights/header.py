"""Headers of safetensors files: the tensors of a file, without their data.

Source of the format: https://github.com/huggingface/safetensors#format (8 bytes of header size, a JSON header, data).
A header is checked before any tensor is read: it may be damaged or malicious.
"""

from __future__ import annotations

import errno
import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from kimi_mlx.errors import WeightsError
from kimi_mlx.files import irregular_kind
from kimi_mlx.model.config import unreadable_hint
from kimi_mlx.model_files import fetch_again_hint

MAX_HEADER_BYTES = 100_000_000
"""Maximum size of a header according to the format."""

LFS_POINTER = b"version "
"""First bytes of the text file that stands for a file in a clone without Git LFS."""

MAX_AXES = 16
"""Maximum number of axes of a tensor."""
MAX_SIZE = 2**63
"""Limit of sizes and offsets."""
MAX_NAME_LENGTH = 500
"""Maximum length of the name of a tensor in characters."""

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "U64": 8,
    "I64": 8,
    "U32": 4,
    "I32": 4,
    "U16": 2,
    "I16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}


@dataclass(frozen=True)
class TensorInfo:
    """Location of a tensor.

    Args:
        dtype: type as safetensors names it, such as `BF16`.
        shape: stored shape.
        file: path of the file.
        start: offset of its first byte in the file, which may be unaligned.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor; 0 for an unknown type."""
        return math.prod(self.shape) * DTYPE_BYTES.get(self.dtype, 0)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read the tensors of one safetensors file, checked against its size.

    Raises:
        WeightsError: as for parse_header, or the file cannot be read.
    """
    try:
        if (kind := irregular_kind(file)) is not None:
            raise OSError(errno.EINVAL, f"it is {kind}, not a file")
        with file.open("rb") as stream:
            return parse_header(file, file.stat().st_size, lambda start, stop: _read(stream, start, stop))
    except OSError as error:
        raise unreadable_error(file, error) from error


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata in the header of a file that read_header accepts; empty without any."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        metadata: Any = json.loads(stream.read(length)).get("__metadata__")
    if not isinstance(metadata, dict):
        return {}
    return {str(name): str(value) for name, value in cast(dict[Any, Any], metadata).items()}


def parse_header(file: Path, size: int, read: Callable[[int, int], bytes]) -> dict[str, TensorInfo]:
    """Parse the header of a safetensors file, local or remote.

    Args:
        file: path of the file, for the table and for messages.
        size: size of the file in bytes.
        read: function that returns the bytes from start to stop.

    Raises:
        WeightsError: the file is not a safetensors file, a name occurs twice, or a tensor has an invalid type, shape or
            range: one that is reversed, longer than the file, shared with another tensor, or not that of its shape.
    """
    start = read(0, 8)
    if start == LFS_POINTER:
        raise WeightsError(
            f"`{file}` is a pointer of Git LFS, not the file itself",
            hint="run `git lfs pull` in its folder, or fetch the model with `kimi-mlx download`",
        )
    length = int.from_bytes(start, "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise WeightsError(
            f"`{file}` is not a safetensors file: its header has {length} bytes, the file {size}",
            hint=fetch_again_hint(file),
        )
    try:
        header = json.loads(read(8, 8 + length).decode(), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise unreadable_error(file, error) from error
    names = _unique(header, f"the header of `{file}`", file)
    names.pop("__metadata__", None)
    tensors = {name: _tensor(name, item, file, 8 + length, size) for name, item in names.items()}
    _check_overlaps(file, tensors)
    return {name: info for name, (info, _) in tensors.items()}


def unreadable_error(path: Path, error: Exception) -> WeightsError:
    """Return the error for a file that cannot be read."""
    reason = error.strerror if isinstance(error, OSError) else reprlib.repr(error)
    return WeightsError(f"`{path}` cannot be read: {reason}", hint=unreadable_hint(path, error))


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as a list of pairs, in which a name may occur twice."""


def _unique(pairs: Any, label: str, file: Path) -> dict[str, Any]:
    """Return a JSON object whose names are distinct and printable."""
    if not isinstance(pairs, _Pairs):
        raise _invalid_error(f"{label} is not a JSON object", file)
    values: dict[str, Any] = {}
    for name, value in pairs:
        if not name.isprintable() or len(name) > MAX_NAME_LENGTH:
            raise _invalid_error(f"{label} has the invalid name {name[:50]!a}", file)
        if name in values:
            raise _invalid_error(f"{label} has `{name}` twice", file)
        values[name] = value
    return values


def _tensor(name: str, pairs: Any, file: Path, data: int, size: int) -> tuple[TensorInfo, int]:
    """Return a checked tensor, and the offset of its end in the file."""
    label = f"tensor `{name}` in `{file}`"
    item = _unique(pairs, label, file)
    dtype = item.get("dtype")
    if not isinstance(dtype, str) or not dtype.isprintable() or len(dtype) > 20:
        raise _invalid_error(f"{label} has dtype {reprlib.repr(dtype)}, which is not a type", file)
    shape, offsets = (_sizes(item.get(key), f"{label} has {key}", file) for key in ("shape", "data_offsets"))
    if len(offsets) != 2:
        raise _invalid_error(f"{label} has {len(offsets)} data_offsets, not 2", file)
    first, last = offsets
    if first > last:
        raise _invalid_error(f"{label} starts at byte {first}, after its end at byte {last}", file)
    if data + last > size:
        raise _invalid_error(f"`{file}` is truncated: tensor `{name}` ends at byte {data + last} of {size}", file)
    expected = math.prod(shape) * DTYPE_BYTES.get(dtype, 0)
    if dtype in DTYPE_BYTES and last - first != expected:
        raise _invalid_error(f"{label} has {last - first} bytes; its shape {shape} in {dtype} needs {expected}", file)
    return TensorInfo(dtype, shape, file, data + first), data + last


def _sizes(values: Any, label: str, file: Path) -> tuple[int, ...]:
    """Check a shape or a pair of offsets: a short list of non-negative integers."""
    numbers: list[Any] = cast(list[Any], values) if isinstance(values, list) else [-1]
    is_valid = len(numbers) <= MAX_AXES and all(type(number) is int and 0 <= number < MAX_SIZE for number in numbers)
    if not is_valid:
        message = f"{label} {reprlib.repr(cast(Any, values))}, which is not a list of non-negative integers"
        raise _invalid_error(message, file)
    return tuple(numbers)


def _check_overlaps(file: Path, tensors: dict[str, tuple[TensorInfo, int]]) -> None:
    """Check that no two tensors share bytes."""
    previous, previous_end = "", 0
    ranges = sorted((info.start, end, name) for name, (info, end) in tensors.items() if end > info.start)
    for start, end, name in ranges:
        if start < previous_end:
            raise _invalid_error(
                f"tensor `{name}` in `{file}` starts at byte {start}, before tensor `{previous}` ends at "
                f"{previous_end}",
                file,
            )
        previous, previous_end = name, end


def _invalid_error(message: str, file: Path) -> WeightsError:
    return WeightsError(message, hint=fetch_again_hint(file))


def _read(stream: BinaryIO, start: int, stop: int) -> bytes:
    stream.seek(start)
    return stream.read(stop - start)
