"""The values of a command's options, and where each of them comes from, for people and for programs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import typer
from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.command_list import load_command
from kimi_mlx.cli.option_defaults import ENVIRONMENT, ONE_CALL, SECRETS, option_defaults
from kimi_mlx.cli.option_file import config_path
from kimi_mlx.cli.output import escape_controls, print_json, print_note, stdout
from kimi_mlx.errors import KimiMlxError, UsageError
from kimi_mlx.runtime.generation_config import FILE_NAMES, GENERATION_CONFIG, GenerationConfig
from kimi_mlx.settings import Settings
from kimi_mlx.store.locate import config_folder
from kimi_mlx.store.model_ref import resolve_model_name
from kimi_mlx.units import format_bytes

BUILT_IN = "built-in"
"""Source of a value that nothing sets."""

MODEL_CARD = "model card"
"""Source of a value from the catalogue of known models."""

SIZES = ("cache_memory", "cache_disk")
"""Options whose values are numbers of bytes."""

NOT_SHOWN = ONE_CALL | {"help"}
"""Parameters without a default of interest."""


@dataclass(frozen=True)
class OptionValue:
    """The value of an option.

    Args:
        name: key of the option in files.
        value: its value; None if it is not set.
        source: where the value comes from.
    """

    name: str
    value: Any
    source: str


def print_config_path(*, is_json: bool) -> None:
    """Print the path of `config.toml`.

    Raises:
        UsageError: the user has no home folder.
    """
    path = config_path()
    if path is None:
        raise UsageError("the user has no home folder for config.toml", hint="set XDG_CONFIG_HOME to a folder")
    if is_json:
        print_json({"path": str(path), "exists": path.exists()})
        return
    stdout.print(str(path), markup=False)
    if not path.exists():
        print_note("there is no such file yet; docs/config.md has an example")


def print_option_values(context: typer.Context, name: str, preset: str | None, *, is_json: bool) -> None:
    """Print the values of a command's options.

    Args:
        context: context of `kimi-mlx config`.
        name: name of the command.
        preset: preset of a chat; None for none.
        is_json: whether to print JSON.

    Raises:
        UsageError: a file cannot be used, or the command has no presets.
    """
    if preset is not None and name != "chat":
        raise UsageError(f"`{name}` has no presets", hint="presets are for `chat`")
    values = option_values(context, name, preset)
    path = config_path()
    exists = path is not None and path.exists()
    if is_json:
        options = [{"name": item.name, "value": item.value, "source": item.source} for item in values]
        print_json({"path": path and str(path), "exists": exists, "command": name, "options": options})
        return
    stdout.print(Text(f"{path} {'' if exists else '(does not exist)'}".rstrip()))
    shown = sorted((item for item in values if item.value is not None), key=lambda item: item.source == BUILT_IN)
    stdout.print(_table(shown), soft_wrap=False)
    unset = ", ".join(item.name for item in values if item.value is None)
    stdout.print(Text(f"Not set: {unset}", style="dim"), soft_wrap=False)


def option_values(context: typer.Context, name: str, preset: str | None = None) -> list[OptionValue]:
    """Return the values that the options of a command have if none is given on the command line.

    Args:
        context: context of `kimi-mlx config`.
        name: name of the command.
        preset: preset of a chat; None for none.

    Raises:
        UsageError: a file cannot be used.
    """
    command = load_command(name)
    command_context = type(context)(command, info_name=name, parent=context.parent)
    defaults = option_defaults(command, command_context, preset)
    found: dict[str, OptionValue] = {}
    for parameter in command.params:
        key = parameter.name.rstrip("_")
        if key in NOT_SHOWN:
            continue
        variable = ENVIRONMENT.get(key)
        if parameter.name in defaults:
            default = defaults[parameter.name]
            found[key] = OptionValue(key, _plain(default.value), default.source)
        elif variable is not None and os.environ.get(variable):
            found[key] = OptionValue(key, "(set)" if key in SECRETS else os.environ[variable], f"${variable}")
        else:
            value = Settings.model if key == "model" else parameter.get_default(command_context)
            found[key] = OptionValue(key, _plain(value), BUILT_IN)
    return list((found | _model_values(found)).values())


def _model_values(found: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """Return the sampling values that the model of a chat recommends, for those that nothing else sets."""
    unset = [name for name in (*FILE_NAMES, "max_tokens") if name in found and found[name].value is None]
    if not unset:
        return {}
    try:
        values = _recommended(str(found["model"].value), without_thinking=found["thinking"].value is False)
    except KimiMlxError:  # an unknown or broken model is an error of the command that loads it
        return {}
    return {name: values[name] for name in unset if name in values}


def _recommended(name: str, *, without_thinking: bool) -> dict[str, OptionValue]:
    """Return the sampling values that a model recommends: of its files, if they are here, and of its card.

    Raises:
        KimiMlxError: the name is unknown, or a file is broken.
    """
    target = resolve_model_name(name)
    folder = config_folder(target)
    instant = target.instant_sampling if without_thinking else {}
    card = {**target.sampling, **instant}
    values = {name: OptionValue(name, value, MODEL_CARD) for name, value in card.items()}
    if folder is None:
        return values
    generation = GenerationConfig.load(folder, card)
    found = {name: getattr(generation.sampling, name) for name in FILE_NAMES} | {"max_tokens": generation.max_tokens}
    from_file = generation.from_file - instant.keys()
    return {
        **{name: OptionValue(name, value, BUILT_IN) for name, value in found.items()},
        **values,
        **{name: OptionValue(name, found[name], GENERATION_CONFIG) for name in from_file},
    }


def _table(values: Sequence[OptionValue]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for item in values:
        table.add_row(item.name, Text(_format(item)), Text(item.source, style="dim"))
    return table


def _format(item: OptionValue) -> str:
    value: object = item.value
    if item.name in SIZES and isinstance(value, int):
        return format_bytes(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    text = ", ".join(map(str, cast("list[Any]", value))) if isinstance(value, list) else str(value)
    return escape_controls(text)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    return str(value) if isinstance(value, Path) else value
