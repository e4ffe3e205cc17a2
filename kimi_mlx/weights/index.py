"""Read the tensor table of a checkpoint from the headers of its safetensors files; tensors are not read here.

Source of the format: https://github.com/huggingface/safetensors#format (8 bytes of header size, a JSON header, data).
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import read_json, unreadable_hint
from kimi_mlx.model.names import IGNORED_PREFIXES

MAX_HEADER_BYTES = 100_000_000
"""Maximum size of a header according to the format."""

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "I64": 8,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
}

INDEX_NAME = "model.safetensors.index.json"

FILE_NAME = re.compile(r"\w[\w .+-]{0,200}\.safetensors", re.ASCII)
"""Allowed file names in an index: a file in the same folder, never a path."""


@dataclass(frozen=True)
class TensorInfo:
    """Location of a tensor.

    Args:
        dtype: type as safetensors names it, such as `BF16`.
        shape: stored shape.
        file: path of the file.
        start: offset of its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor; 0 for an unknown type."""
        return math.prod(self.shape) * DTYPE_BYTES.get(self.dtype, 0)


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of all files of a checkpoint.

    Raises:
        WeightsError: there are no files; a file is missing, truncated or not safetensors; a name occurs twice.
    """
    table: dict[str, TensorInfo] = {}
    for file in checkpoint_files(folder):
        for name, info in read_header(file).items():
            if name in table:
                raise WeightsError(f"tensor `{name}` is in `{table[name].file.name}` and in `{file.name}`")
            table[name] = info
    return table


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the safetensors files that the index names, or without an index `model*.safetensors`.

    Files with only vision tensors are optional: they are listed if present.
    """
    index = folder / INDEX_NAME
    try:
        files = _indexed_files(index) if index.exists() else sorted(folder.glob("model*.safetensors"))
        missing = [file.name for file in files if not file.is_file()]
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not files:
        raise WeightsError(f"`{folder}` has no `model*.safetensors`", hint="give the folder of a complete checkpoint")
    if missing:
        raise WeightsError(
            f"{len(missing)} of {len(files)} files of `{folder}` are missing, first `{missing[0]}`",
            hint="finish the download",
        )
    return files


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the index of a checkpoint: name of a tensor -> file name.

    Raises:
        ConfigError: the index cannot be read.
        WeightsError: the index has no `weight_map`, or the map names a file outside the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"`{index}` has no `weight_map`", hint="fetch the file again")
    for name in cast(dict[str, Any], weight_map).values():
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise WeightsError(
                f"`{index}` names the file {reprlib.repr(name)}, which is not a `*.safetensors` in the same folder",
                hint="fetch the file again",
            )
    return cast(dict[str, str], weight_map)


def files_in_use(weight_map: Mapping[str, str]) -> set[str]:
    """Return the files with tensors of the text model; files with only vision tensors may be missing."""
    return {file for tensor, file in weight_map.items() if not tensor.startswith(IGNORED_PREFIXES)}


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_weight_map(index)
    in_use = files_in_use(weight_map)
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    return [file for file in files if file.name in in_use or file.is_file()]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read the tensors of one safetensors file, checked against its size."""
    try:
        with file.open("rb") as stream:
            return parse_header(file, file.stat().st_size, lambda start, stop: _read(stream, start, stop))
    except OSError as error:
        raise _unreadable(file, error) from error


def parse_header(file: Path, size: int, read: Callable[[int, int], bytes]) -> dict[str, TensorInfo]:
    """Parse the header of a safetensors file, local or remote.

    Args:
        file: path of the file, for the table and for messages.
        size: size of the file in bytes.
        read: function that returns the bytes from start to stop.

    Raises:
        WeightsError: the file is not a safetensors file, or a tensor ends after the end of the file.
    """
    length = int.from_bytes(read(0, 8), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise WeightsError(
            f"`{file}` is not a safetensors file: its header has {length} bytes, the file {size}",
            hint="fetch the file again",
        )
    try:
        header: dict[str, Any] = json.loads(read(8, 8 + length))
        header.pop("__metadata__", None)
        return {name: _tensor_info(name, item, file, 8 + length, size) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(file, error) from error


def _read(stream: BinaryIO, start: int, stop: int) -> bytes:
    stream.seek(start)
    return stream.read(stop - start)


def _unreadable(path: Path, error: Exception) -> WeightsError:
    reason = error.strerror if isinstance(error, OSError) else repr(error)
    return WeightsError(f"`{path}` cannot be read: {reason}", hint=unreadable_hint(error))


def _tensor_info(name: str, item: dict[str, Any], file: Path, data: int, size: int) -> TensorInfo:
    dtype, shape = str(item["dtype"]), _sizes(item["shape"])
    first, last = _sizes(item["data_offsets"])
    if first > last:
        raise WeightsError(
            f"`{file}`: tensor `{name}` starts at byte {first}, after its end at byte {last}",
            hint="fetch the file again",
        )
    if data + last > size:
        raise WeightsError(
            f"`{file}` is cut short: tensor `{name}` ends at byte {data + last} of {size}",
            hint="fetch the file again",
        )
    expected = math.prod(shape) * DTYPE_BYTES.get(dtype, 0)
    if dtype in DTYPE_BYTES and last - first != expected:
        raise WeightsError(f"`{file}`: tensor `{name}` has {last - first} bytes, its shape needs {expected}")
    return TensorInfo(dtype, shape, file, data + first)


def _sizes(values: Any) -> tuple[int, ...]:
    """Check a shape or a pair of offsets: a list of non-negative integers."""
    numbers: list[Any] = cast(list[Any], values) if isinstance(values, list) else [-1]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{reprlib.repr(cast(Any, values))} is not a list of non-negative integers")
    return tuple(numbers)
