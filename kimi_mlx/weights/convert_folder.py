"""The output folder of a conversion: check its contents and its disk, lock it, explain disk errors.

A record in the folder identifies an unfinished conversion.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.files import free_disk_bytes, is_disk_full, write_atomically
from kimi_mlx.units import format_bytes
from kimi_mlx.weights.conversion import Conversion

RECORD_NAME = ".convert.json"
"""Record of an unfinished conversion."""


def check_folder(conversion: Conversion, folder: Path) -> None:
    """Refuse a folder with anything but an earlier run of the same conversion.

    Raises:
        UsageError: the folder contains other files or a different conversion.
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
        state = "already contains a model" if "config.json" in present else f"is not empty: it has `{min(present)}`"
        raise UsageError(f"`{folder}` {state}", hint="choose a new folder; nothing in it was changed")
    present_record, new_record = _read_record(folder), conversion.record()
    if present_record != new_record:
        raise UsageError(
            f"`{folder}` contains an unfinished conversion of {_describe(present_record)}; "
            f"this command converts {_describe(new_record)}",
            hint="use the same source and options to resume, choose a new folder, or remove this one",
        )


def _is_part_of_record(name: str) -> bool:
    """Return whether this is a partial record: the process was killed while writing it."""
    return name.startswith(RECORD_NAME + ".") and name.endswith(".part")


def check_space(conversion: Conversion, folder: Path) -> None:
    """Refuse a conversion for which the disk is too small.

    Raises:
        WeightsError: the disk has less free space than the result needs.
    """
    needed = conversion.size_bytes - _present_bytes(conversion, folder)
    free = free_disk_bytes(folder)
    if needed > free:
        raise WeightsError(
            f"the result needs {format_bytes(needed)} in `{folder}`, but its disk has {format_bytes(free)} free",
            hint="free some space, choose another disk, or lower --bits",
        )


def _present_bytes(conversion: Conversion, folder: Path) -> int:
    """Return the bytes of finished files and of the unfinished one, whose space is reused."""
    names = [name for file in conversion.plan.files for name in (file.name, file.name + ".part")]
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())


@contextmanager
def lock_folder(folder: Path, record: dict[str, Any]) -> Generator[None]:
    """Lock a folder against other processes, and record the conversion in it."""
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
        raise WeightsError(f"another process is converting into `{folder}`", hint="wait for it, or stop it") from None
    except OSError:
        pass  # network file systems may not support locks


@contextmanager
def explain_disk_errors(conversion: Conversion, folder: Path) -> Generator[None]:
    """Turn errors of the disk into WeightsError with a hint."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise WeightsError(f"`{folder}` cannot be written: {error.strerror}", hint="check its disk") from error
        needed = conversion.size_bytes - _present_bytes(conversion, folder)
        free = free_disk_bytes(folder)
        raise WeightsError(
            f"the disk is full: the rest needs {format_bytes(needed)} in `{folder}`, but {format_bytes(free)} are free",
            hint="free some space, then run the same command again to resume",
        ) from error


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD_NAME).read_bytes())
        return {name: record[name] for name in ("format", "source", "options")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"`{folder / RECORD_NAME}` cannot be read: {error!r}", hint="choose a new folder, or remove this one"
        ) from error


def _describe(record: dict[str, Any]) -> str:
    """Describe source and options, such as `/k2 (1f0c5a3b) with bits 4, group_size 64`."""
    options = ", ".join(f"{name} {value}" for name, value in record["options"].items() if value is not None)
    source = record["source"]
    return f"`{source['folder']}` ({source['digest'][:8]}) with {options or 'no options'}"
