"""Files that set defaults of options: the user's `config.toml`, and presets."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from kimi_mlx.cli.options import DiskCacheOptions, RunOptions
from kimi_mlx.errors import UsageError
from kimi_mlx.folders import config_folder
from kimi_mlx.services.service import LOG_VARIABLE

CONFIG_NAME = "config.toml"
PRESET_FOLDER = "presets"
TABLES = ("chat", "serve", "bench", "launch")
"""Commands that have a table in `config.toml`."""

SHARED_KEYS = tuple(item.name for group in (RunOptions, DiskCacheOptions) for item in fields(group))
"""Keys of `config.toml` outside of the tables: options that several commands have."""

MAX_BYTES = 1_000_000
"""Maximum size of a file of defaults; a larger one is not what the user meant."""


@dataclass(frozen=True)
class OptionFile:
    """A file of defaults that has been read.

    Args:
        path: the file.
        label: its name as the source of a value, such as `config.toml`.
        values: keys outside of tables.
        tables: keys of the tables, by name.
    """

    path: Path
    label: str
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, "Mapping[str, Any]"])

    def place(self, table: str | None = None) -> str:
        """Return the location of a table in error messages; None for keys outside of tables."""
        return f"`{self.path}`" + (f": [{table}]" if table else "")


def config_path() -> Path | None:
    """Return the path of the user's `config.toml`, which may not exist; None for a user without a home folder."""
    folder = config_folder()
    return None if folder is None else folder / CONFIG_NAME


def read_config() -> OptionFile | None:
    """Read the user's `config.toml`; None if there is none, and in a service, which has the values of its installation.

    Raises:
        UsageError: the file cannot be read, is not TOML, or has an unknown table or an unknown key outside of tables.
    """
    path = config_path()
    if path is None or not path.exists() or os.environ.get(LOG_VARIABLE):
        return None
    content = _read_toml(path)
    tables: dict[str, dict[str, Any]] = {name: value for name, value in content.items() if isinstance(value, dict)}
    values = {name: value for name, value in content.items() if name not in tables}
    file = OptionFile(path, CONFIG_NAME, values, tables)
    for name in tables:
        if name not in TABLES:
            raise UsageError(f"{file.place()} has an unknown table [{name}]", hint=near_names(name, TABLES))
    for name in values:
        if name not in SHARED_KEYS:
            hint = f"put it into the table of its command, such as [{TABLES[0]}]; {near_names(name, SHARED_KEYS)}"
            raise UsageError(f"{file.place()} has an unknown key `{name}` outside of tables", hint=hint)
    return file


def read_preset(name: str) -> OptionFile:
    """Read a preset: a file with the keys of the table [chat].

    Args:
        name: path of the file, or the name of a file in the folder `presets` beside `config.toml`.

    Raises:
        UsageError: there is no such file, or it cannot be read, is not TOML, or has tables.
    """
    path = Path(os.path.expanduser(name))
    if not path.exists() and (kept := _preset_paths().get(name)) is not None:
        path = kept
    if not path.exists():
        presets = ", ".join(f"`{preset}`" for preset in _preset_paths())
        hint = f"there are the presets {presets}" if presets else "name a TOML file with keys such as `temperature`"
        if not presets and (folder := config_folder()) is not None:
            hint += f", or write `{folder / PRESET_FOLDER / f'{path.stem}.toml'}`"
        raise UsageError(f"there is no preset `{name}`", hint=hint)
    content = _read_toml(path)
    file = OptionFile(path.absolute(), f"preset {path.stem}", content)
    if table := next((key for key, value in content.items() if isinstance(value, dict)), None):
        raise UsageError(
            f"{file.place()} has a table [{table}]", hint="a preset has the keys of [chat], without tables"
        )
    return file


def near_names(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the similar ones, or all of them."""
    known = list(known)
    usual = name.lower().replace("-", "_")
    similar = [usual] if usual in known else difflib.get_close_matches(usual, known, n=2, cutoff=0.6)
    if similar:
        return f"did you mean {' or '.join(f'`{item}`' for item in similar)}?"
    return f"there are {', '.join(known)}"


def _preset_paths() -> dict[str, Path]:
    """Return the presets in the user's folder, by name."""
    folder = config_folder()
    return {} if folder is None else {path.stem: path for path in sorted((folder / PRESET_FOLDER).glob("*.toml"))}


def _read_toml(path: Path) -> dict[str, Any]:
    toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # only if there is a file
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UsageError(f"`{path}` has more than {MAX_BYTES} bytes", hint="check the name of the file")
        return cast("dict[str, Any]", toml.loads(data.decode("utf-8")))
    except OSError as error:
        raise UsageError(f"`{path}` cannot be read: {error.strerror}", hint="check its name and permissions") from error
    except (ValueError, RecursionError) as error:
        hint = 'write `key = value` lines; texts need quotes: `model = "kimi-k2"`'
        raise UsageError(f"`{path}` is not TOML: {error}", hint=hint) from error
