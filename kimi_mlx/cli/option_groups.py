"""Options that several commands share, declared once as a dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose type is a dataclass by one option per field.

    Typer sees a flat list of options in the order of the parameters; the command receives the dataclasses. A
    field that several of them have is one option.

    Args:
        command: function of a command; its dataclass parameters have fields of type `Annotated[..., typer.Option()]`,
            or of a type that is such a dataclass.
    """
    hints = inspect.get_annotations(command, eval_str=True)  # get_type_hints of Python 3.10 hides Annotated in Optional
    groups: dict[str, type[Any]] = {}
    single: list[str] = []
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if _is_group(hint):
            groups[parameter.name] = hint
            options += [option for option in _options_of(hint) if option.name not in {each.name for each in options}]
        else:
            single.append(parameter.name)
            options.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        built = {name: build_group(group, values) for name, group in groups.items()}
        command(**{name: values[name] for name in single}, **built)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = inspect.Signature(options)  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def build_group(group: type[T], values: Mapping[str, Any]) -> T:
    """Return a dataclass of options, or of such dataclasses.

    Args:
        group: the dataclass.
        values: values of its fields, by name, at any depth; other values are ignored.
    """
    hints = get_type_hints(group)
    return group(
        **{
            field.name: build_group(hint, values) if _is_group(hint := hints[field.name]) else values[field.name]
            for field in fields(group)  # pyright: ignore[reportArgumentType]
        }
    )


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def _options_of(group: type[Any]) -> list[inspect.Parameter]:
    """Return the fields of a dataclass as keyword parameters; those of a field's dataclass in its place."""
    hints = get_type_hints(group, include_extras=True)
    options: list[inspect.Parameter] = []
    for field in fields(group):
        hint = hints[field.name]
        if _is_group(hint):
            options += [option for option in _options_of(hint) if option.name not in {each.name for each in options}]
        else:
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            options.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            )
    return options
