"""Defaults of a command's options from files, and the source of each value.

From the strongest to the weakest: the command line, a preset, environment variables, `config.toml`, and then the
model's own values or the built-in ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import typer

from kimi_mlx.cli.option_file import OptionFile, near_names, read_config, read_preset
from kimi_mlx.errors import UsageError

COMMAND_LINE = "option"
"""Source of a value from the command line."""

ENVIRONMENT = {"model": "KIMI_MLX_MODEL", "api_key": "KIMI_MLX_API_KEY"}
"""Environment variables that stand for options."""

ONE_CALL = frozenset(
    {"prompt", "file", "image", "video", "schema", "json", "continue", "preset", "words", "save", "install", "force"}
)
"""Options that belong to a single call, and not into a file of defaults."""

SECRETS = frozenset({"api_key"})
"""Options with keys, which do not belong into a file of settings either."""

PATHS = frozenset({"cache_dir", "api_key_file", "system_file", "mcp", "hostfile"})
"""Options that name a file or a folder; in a file they are relative to its folder."""

ALTERNATIVES = (
    frozenset({"system", "system_file"}),
    frozenset({"hosts", "hostfile"}),
    frozenset({"url", "load"}),
    frozenset({"url", "ranks"}),
)
"""Options that exclude each other: one that is set hides the others of weaker sources."""

NOT_ON_HOSTS = frozenset({"ranks", "url", "load"})
"""Options whose defaults do not hold for a command on launched hosts."""

LAUNCHED = "kimi_mlx.launched"
"""Key of the context's metadata that is set for a command on launched hosts."""

_SOURCES = "kimi_mlx.option_sources"


@dataclass(frozen=True)
class OptionDefault:
    """A default from a file.

    Args:
        value: value as the option takes it.
        source: name of the source for people.
    """

    value: Any
    source: str


def set_defaults(command: Any, context: Any, arguments: list[str]) -> None:
    """Set the defaults of a command's options from the preset that is named, and from `config.toml`.

    Args:
        command: Typer's command.
        context: context of the command; its `default_map` is set.
        arguments: words of the command line after the command.

    Raises:
        UsageError: a file cannot be used, or has an unknown key or a wrong value.
    """
    given, _, _ = command.make_parser(context).parse_args(args=list(arguments))
    used = {name for name, value in given.items() if value is not None}
    found = option_defaults(command, context, given.get("preset"), used)
    context.default_map = {name: default.value for name, default in found.items()}
    context.meta[_SOURCES] = {name: default.source for name, default in found.items()}


def option_defaults(
    command: Any, context: Any, preset: str | None = None, used: set[str] | None = None
) -> dict[str, OptionDefault]:
    """Return the defaults of a command's options that files set, by the name of the parameter.

    Args:
        command: Typer's command.
        context: context of the command.
        preset: name of the preset; None for none.
        used: names of the parameters that the command line sets.

    Raises:
        UsageError: a file cannot be used, or has an unknown key or a wrong value.
    """
    found: dict[str, OptionDefault] = {}
    taken = set(used or ()) | (NOT_ON_HOSTS if context.meta.get(LAUNCHED) else set[str]())
    if preset is not None:
        file = read_preset(preset)
        found |= _defaults_of(file, None, file.values, command, context, taken)
    taken |= {*found, *(name for name, variable in ENVIRONMENT.items() if os.environ.get(variable))}
    config = read_config()
    if config is not None:
        name = context.info_name
        found |= _defaults_of(config, name, config.tables.get(name, {}), command, context, taken)
        known = {_key(parameter.name) for parameter in command.params}
        shared = {key: value for key, value in config.values.items() if key in known}
        found |= _defaults_of(config, None, shared, command, context, taken | set(found))
    return found


def option_sources(context: typer.Context) -> dict[str, str]:
    """Return where the values of a command's options come from, by name; without those that nothing has set."""
    sources: Mapping[str, str] = context.meta.get(_SOURCES, {})
    found: dict[str, str] = {}
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            found[name] = COMMAND_LINE
        elif name in sources:
            found[name] = sources[name]
    return found


def _defaults_of(
    file: OptionFile, table: str | None, values: Mapping[str, Any], command: Any, context: Any, taken: Set[str]
) -> dict[str, OptionDefault]:
    """Return the defaults that keys of a file set; all of them are checked.

    Args:
        file: the file.
        table: name of the table with the keys; None outside of tables.
        values: the keys.
        command: Typer's command.
        context: context of the command.
        taken: names of the parameters that stronger sources set.
    """
    parameters = {_key(parameter.name): parameter for parameter in command.params}
    converted = {
        key: _convert(file.place(table), file.path, key, value, parameters, context) for key, value in values.items()
    }
    named = {parameters[key].name: OptionDefault(value, file.label) for key, value in converted.items()}
    return {name: default for name, default in named.items() if name not in taken and not _is_hidden(name, taken)}


def _is_hidden(name: str, taken: Set[str]) -> bool:
    """Return whether an option excludes one that a stronger source sets."""
    return any(name in group and group & taken for group in ALTERNATIVES)


def _convert(place: str, path: Path, key: str, value: Any, parameters: Mapping[str, Any], context: Any) -> Any:
    """Return a value of a file as its option takes it.

    Raises:
        UsageError: there is no such option, it does not belong into a file, or the value is wrong.
    """
    allowed = [name for name in parameters if name not in ONE_CALL | SECRETS | {"help"}]
    if key in SECRETS:
        raise UsageError(f"{place} has a secret, `{key}`", hint="put it into a file of its own, see `api_key_file`")
    if key in ONE_CALL and key in parameters:
        raise UsageError(f"{place} sets `{key}`, which belongs to a single call", hint="give it on the command line")
    if key not in allowed:
        raise UsageError(f"{place} has an unknown key `{key}`", hint=near_names(key, allowed))
    parameter = parameters[key]
    raw = _as_typed(path.parent, key, value, is_list=parameter.multiple)
    try:
        result = parameter.process_value(context, raw)
    except typer.BadParameter as error:
        raise UsageError(f"{place} sets {key} to {value!r}: {error.message}") from None
    except UsageError as error:
        raise UsageError(f"{place} sets {key} to {value!r}: {error.message}", hint=error.hint) from None
    if expected := _expected_type(raw, result):
        raise UsageError(f"{place} sets {key} to {value!r}, which is not {expected}")
    return raw


def _as_typed(folder: Path, key: str, value: Any, *, is_list: bool) -> Any:
    """Return a value in the form in which the command line gives it: lists joined by commas, paths as absolute ones."""
    if is_list:
        items = cast("list[Any]", value) if isinstance(value, list) else [value]
        return [_as_typed(folder, key, item, is_list=False) for item in items]
    if isinstance(value, list):
        return ",".join(str(item) for item in cast("list[Any]", value))
    is_path = key in PATHS or (key == "model" and isinstance(value, str) and value.startswith(("~", ".")))
    if is_path and isinstance(value, str):
        return str(folder / os.path.expanduser(value))
    return value


def _expected_type(value: Any, result: Any) -> str | None:
    """Return the type that an option needs, if a value of another type was converted to it."""
    if isinstance(result, bool) != isinstance(value, bool):
        return "true or false" if isinstance(result, bool) else "a number or a text"
    if isinstance(result, int) and isinstance(value, float):
        return "a whole number"
    if isinstance(result, str) and not isinstance(value, str):
        return "a text in quotes"
    return None


def _key(name: str) -> str:
    """Return the key of a parameter in files: its name, without the underscore after a keyword of Python."""
    return name.rstrip("_")
