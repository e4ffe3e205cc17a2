"""Commands of other tools, such as `pull`: each exits with a hint to the command of kimi-mlx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from kimi_mlx.errors import UsageError

HINTS = {
    "list": "type `kimi-mlx models`",
    "ls": "type `kimi-mlx models`",
    "pull": "type `kimi-mlx download MODEL`",
    "run": "type `kimi-mlx chat MODEL`",
    "remove": "type `kimi-mlx rm MODEL`",
    "delete": "type `kimi-mlx rm MODEL`",
    "show": "type `kimi-mlx models MODEL`",
    "info": "type `kimi-mlx models MODEL`",
    "help": "type `kimi-mlx --help`, or `kimi-mlx COMMAND --help`",
    "version": "type `kimi-mlx --version`",
    "stop": "type Ctrl-C where the model runs, or `kimi-mlx service stop`",
    "ps": "type `kimi-mlx status`",
}


def _command(name: str) -> Callable[..., None]:
    def refuse(words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        raise UsageError(f"kimi-mlx has no command `{name}`", hint=HINTS[name])

    refuse.__doc__ = "Not a command of kimi-mlx."
    return refuse


def __getattr__(name: str) -> Callable[..., None]:
    """Return the command with this name."""
    if name not in HINTS:
        raise AttributeError(name)
    return _command(name)
