"""The files of a checkpoint, and the table of its tensors.

The table comes from the headers of the files. `model.safetensors.index.json` only says which files belong to the
checkpoint: it may be missing, empty, or left over from other files, and then the headers decide.
"""

from __future__ import annotations

import json
import logging
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from kimi_mlx.errors import WeightsError
from kimi_mlx.files import irregular_kind, read_regular_file
from kimi_mlx.model.vision_names import is_vision
from kimi_mlx.model_files import fetch_again_hint, small_names
from kimi_mlx.weights.header import TensorInfo, read_header, unreadable_error

LOG = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"

FILE_NAME = re.compile(r"\w[\w .+-]{0,200}\.safetensors", re.ASCII)
"""Allowed file names in an index: a file in the same folder, never a path."""

SERIES = re.compile(r"(.+)-(\d{1,9})-of-(\d{1,9})\.safetensors", re.ASCII)
"""Names of numbered files, such as `model-00002-of-00061.safetensors`."""


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of all files of a checkpoint.

    The table has no vision tensors if some of those in the index are in no file: the model is then a text model.

    Raises:
        WeightsError: there are no files; a file is missing, truncated or not safetensors; a name occurs twice.
    """
    table: dict[str, TensorInfo] = {}
    for file in checkpoint_files(folder):
        for name, info in read_header(file).items():
            if name in table:
                raise WeightsError(
                    f"tensor `{name}` is in `{table[name].file}` and in `{file.name}`",
                    hint="remove the file that does not belong to the checkpoint",
                )
            table[name] = info
    if lacks_vision(folder, table):
        return {name: info for name, info in table.items() if not is_vision(name)}
    return table


def lacks_vision(folder: Path, table: Collection[str] | None = None) -> bool:
    """Return whether the index of a checkpoint lists vision tensors that are in none of its files.

    They may have been left out on purpose, or by a version of kimi-mlx that did not use them.

    Args:
        folder: folder of the checkpoint.
        table: names of the tensors in its files; None to check only whether the listed files exist.

    Raises:
        WeightsError: the index is unreadable.
    """
    index = folder / INDEX_NAME
    weight_map = read_weight_map(index) if index.is_file() else {}
    if table is None:
        return any(not (folder / file).is_file() for name, file in weight_map.items() if is_vision(name))
    return bool(missing_vision(weight_map, table))


def has_vision(folder: Path) -> bool:
    """Return whether a checkpoint has vision tensors, by its index, or by the headers of its files without one.

    Raises:
        WeightsError: the index or a file is unreadable.
    """
    index = folder / INDEX_NAME
    names = (read_weight_map(index) if index.is_file() else {}) or read_index(folder)
    return any(map(is_vision, names)) and not lacks_vision(folder)


def missing_vision(weight_map: Mapping[str, str], table: Collection[str]) -> set[str]:
    """Return the vision tensors of an index that are not in a table."""
    return {name for name in weight_map if is_vision(name)} - set(table)


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint; log a note if they are not those of its index.

    - The index lists the files. A listed file with only vision tensors may be missing.
    - Without a usable index, or if no listed file exists, all `model*.safetensors` are used.
    - A listed file may also be missing if all its tensors are in other files.
    - An unlisted `model*.safetensors` is used if it has tensors that no listed file has.

    Raises:
        WeightsError: there are no files, some are missing or unreadable, or the index names a file outside the folder.
    """
    index = folder / INDEX_NAME
    try:
        names = {path.name for path in folder.glob("model*.safetensors") if path.is_file()}
        has_index = index.exists()
        weight_map = read_weight_map(index) if has_index else {}
        in_use = files_in_use(weight_map)
        listed = {name: (folder / name).is_file() for name in sorted(set(weight_map.values()))}
    except OSError as error:
        raise unreadable_error(folder, error) from error
    present = [name for name, exists in listed.items() if exists]
    missing = [name for name, exists in listed.items() if not exists and name in in_use]
    unlisted = sorted(names - listed.keys())
    if present:
        files = _files_by_index(folder, weight_map, present, missing, unlisted)
    elif missing and not unlisted:
        raise _missing_error(folder, missing, len(in_use))
    else:
        files = _files_without_index(folder, unlisted)
        if has_index:
            defect = "lists only files that do not exist" if missing else "lists no files"
            log_note(f"`{index}` {defect}: the `model*.safetensors` of its folder are read instead")
    return [folder / name for name in files]


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the index of a checkpoint, as parse_weight_map does.

    Raises:
        WeightsError: the file cannot be read, or names a file outside the folder.
    """
    try:
        data = read_regular_file(index)
    except OSError as error:
        raise unreadable_error(index, error) from error
    return parse_weight_map(data, str(index))


def parse_weight_map(data: bytes, where: str) -> dict[str, str]:
    """Parse the index of a checkpoint: name of a tensor -> file name. Empty if it is not a usable index.

    Args:
        data: content of the file.
        where: path or repository, for messages.

    Raises:
        WeightsError: it names a file outside the folder.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    weight_map = cast(dict[str, Any], value).get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict):
        return {}
    for name in cast(dict[str, Any], weight_map).values():
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise WeightsError(
                f"`{where}` names the file {reprlib.repr(name)}, which is not a `*.safetensors` in the same folder",
                hint=fetch_again_hint(where),
            )
    return cast(dict[str, str], weight_map)


def files_in_use(weight_map: Mapping[str, str]) -> set[str]:
    """Return the files with tensors of the text model; files with only vision tensors may be missing."""
    return {file for tensor, file in weight_map.items() if not is_vision(tensor)}


def vision_only_files(weight_map: Mapping[str, str]) -> set[str]:
    """Return the files of an index that have only vision tensors."""
    return set(weight_map.values()) - files_in_use(weight_map)


def unlisted_of_series(weight_map: Mapping[str, str], names: Iterable[str]) -> set[str]:
    """Return the names that an index does not list although it lists others of the same numbered series."""
    listed = set(weight_map.values())
    series = {_series_of(name) for name in listed} - {None}
    return {name for name in names if name not in listed and _series_of(name) in series}


@cache
def log_note(text: str) -> None:
    """Log a note; the same text only once in a process."""
    LOG.warning("%s", text)


def _files_by_index(
    folder: Path,
    weight_map: Mapping[str, str],
    present: Sequence[str],
    missing: Sequence[str],
    unlisted: Sequence[str],
) -> list[str]:
    """Return the listed files that are present, and the unlisted files with further tensors.

    Raises:
        WeightsError: a tensor of a missing file is in no other file.
    """
    if not missing and not unlisted:
        return list(present)
    tensors = {name for file in present for name in read_header(folder / file)}
    added: list[str] = []
    for file in unlisted:
        header = read_header(folder / file).keys()
        if header - tensors:
            added.append(file)
            tensors |= header
    if any(file in missing and name not in tensors for name, file in weight_map.items()):
        raise _missing_error(folder, missing, len(files_in_use(weight_map)))
    if missing:
        log_note(f"`{folder / INDEX_NAME}` lists `{missing[0]}`, which does not exist: its tensors are in other files")
    if added:
        log_note(f"`{folder / INDEX_NAME}` does not list `{added[0]}`, which has tensors: it is read too")
    return sorted([*present, *added])


def _files_without_index(folder: Path, names: Collection[str]) -> list[str]:
    """Return all files, checked for gaps in numbered series."""
    if not names:
        for path in folder.glob("model*.safetensors"):
            if kind := irregular_kind(path):
                raise WeightsError(f"`{path}` is {kind}, not a file", hint="remove it, then finish the download")
        raise WeightsError(f"`{folder}` has no `model*.safetensors`", hint="give the folder of a complete checkpoint")
    series = Counter(series for name in names if (series := _series_of(name)))
    for stem, total in series:
        if series[stem, total] < total:
            raise WeightsError(
                f"`{folder}` has {series[stem, total]} of the {total} files `{stem}-*-of-{total:05}.safetensors`",
                hint="finish the download",
            )
    return sorted(names)


def require_small_files(folder: Path) -> list[str]:
    """Return kimi_mlx.model_files.list_small_files, once it is known that nothing else has the name of a small file.

    Raises:
        WeightsError: a pipe, a device, a folder or a broken link does.
    """
    names = small_names(folder)
    for name in names:
        if kind := irregular_kind(folder / name):
            raise WeightsError(f"`{folder / name}` is {kind}, not a file", hint="put the file there, or remove it")
    return names


def _series_of(name: str) -> tuple[str, int] | None:
    """Return stem and length of the numbered series to which a file belongs."""
    match = SERIES.fullmatch(name)
    return (match[1], int(match[3])) if match else None


def _missing_error(folder: Path, missing: Sequence[str], total: int) -> WeightsError:
    kind = irregular_kind(folder / missing[0])
    return WeightsError(
        f"{len(missing)} of {total} files of `{folder}` are missing, first `{missing[0]}`"
        + (f", which is {kind} in place of the file" if kind else ""),
        hint=f"remove `{folder / missing[0]}`, then finish the download" if kind else "finish the download",
    )
