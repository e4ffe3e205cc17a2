"""The model of a chat: the one with a name, else the only real model of this machine, else kimi-mini with a note."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_mlx.cli.chat.files.media_files import media_kind
from kimi_mlx.cli.option_defaults import ENVIRONMENT
from kimi_mlx.cli.options import model_name
from kimi_mlx.cli.output import print_note, stderr
from kimi_mlx.cluster.hosts.machine import LocalMachine, local_machine
from kimi_mlx.errors import UsageError
from kimi_mlx.settings import Settings
from kimi_mlx.store.model_ref import ModelRef, resolve_model_name, similar_aliases
from kimi_mlx.units import GIB, format_bytes

if TYPE_CHECKING:
    from kimi_mlx.cli.models_table import Row

TOY = "kimi-mini is a toy: it shows that everything works, but it knows nothing."


def resolve_chat_model(argument: str | None, prompt: str | None) -> ModelRef:
    """Return the model of a chat; without a prompt, an unknown name may be meant as one.

    Args:
        argument: name that the user gave; None for none.
        prompt: prompt of the user.

    Raises:
        UsageError: unknown name, or an unsupported model.
    """
    is_named = argument or _has_default()
    name = model_name(argument) if is_named else default_model(_rows(local_machine()))
    try:
        return resolve_model_name(name)
    except UsageError as error:
        if (kind := media_kind(Path(name))) is not None:
            hint = f"write `--{kind}` before each file: `--{kind} {shlex.quote(name)}`"
            raise UsageError(
                f"`{name}` is no model, but the name of {'an image' if kind == 'image' else 'a video'}", hint=hint
            ) from None
        if prompt is not None or "/" in name or similar_aliases(name):
            raise
        hint = f"to send it as a prompt, type `kimi-mlx chat -p {shlex.quote(name)}`; {error.hint}"
        raise UsageError(error.message, hint=hint) from None


def show_first_note() -> None:
    """Print the note above a conversation for which no model is named, if it is on a terminal."""
    if stderr.is_terminal and not _has_default():
        machine = local_machine()
        print_note(f"{first_note(_rows(machine), machine)}\n")


def default_model(rows: Sequence[Row]) -> str:
    """Return the model of a chat without a name: the real model of this machine if there is exactly one, else the toy.

    Args:
        rows: all known models, with their state on this machine.
    """
    ready = _ready(rows)
    return ready[0].entry.alias if len(ready) == 1 and ready[0].hosts_needed == 1 else Settings.model


def first_note(rows: Sequence[Row], machine: LocalMachine) -> str:
    """Return the note above a chat without a name of a model: what it is, what would fit, and the command for it.

    Args:
        rows: all known models, with their state on this machine.
        machine: this machine.
    """
    ready = _ready(rows)
    chosen = default_model(rows)
    if chosen != Settings.model:
        return f"{chosen} is the model on this machine; `kimi-mlx chat NAME` takes another one."
    if ready:
        names = ", ".join(row.entry.alias for row in ready)
        return f"{TOY}\nOn this machine: {names}. {_command(ready[-1], machine)}"
    return "\n".join([TOY, *_recommendations(rows, machine)])


def _recommendations(rows: Sequence[Row], machine: LocalMachine) -> list[str]:
    """Return a line for the best model that fits on this machine, and one for the best that fits on several like it."""
    real = [row for row in rows if not row.entry.is_packaged and row.entry.refused is None]
    fitting = [row for row in real if row.hosts_needed == 1]
    larger = [row for row in real if row.hosts_needed is not None and row.hosts_needed > 1]
    kind = "Mac" if machine.is_mac else "machine"
    here = f"this {kind} ({machine.memory_bytes / GIB:.0f} GB)"
    lines: list[str] = []
    if fitting:
        best = _newest(fitting)
        size = "" if best.size_bytes is None else f" ({format_bytes(best.size_bytes)})"
        lines.append(
            f"{here[0].upper()}{here[1:]} runs {best.entry.alias}: `kimi-mlx download {best.entry.alias}`{size}"
        )
    if larger:
        fewest = min(row.hosts_needed or 0 for row in larger)
        best = _newest([row for row in larger if row.hosts_needed == fewest])
        hosts = "mac-a.local,mac-b.local" + ",..." * (fewest > 2)
        command = f"`kimi-mlx launch --hosts {hosts} chat {best.entry.alias}`"
        lines.append(f"{fewest} {kind}s of this size run {best.entry.alias}: {command}")
    elif not fitting:
        lines.append(f"{here[0].upper()}{here[1:]} is too small for the known models: `kimi-mlx models` lists them")
    return lines


def _has_default() -> bool:
    """Return whether the user has chosen a default model."""
    return bool(os.environ.get(ENVIRONMENT["model"]))


def _rows(machine: LocalMachine) -> list[Row]:
    # heavy imports: not for a chat whose model is named
    from kimi_mlx.cli.models_table import find_row
    from kimi_mlx.hub.catalogue import catalogue

    return [find_row(entry, machine) for entry in catalogue()]


def _newest(rows: Sequence[Row]) -> Row:
    """Return the newest model, if possible one that can answer with and without thinking; rows are sorted by age."""
    return ([row for row in rows if row.entry.instant_sampling is not None] or list(rows))[-1]


def _ready(rows: Sequence[Row]) -> list[Row]:
    """Return the real models that are complete on this machine."""
    return [row for row in rows if row.local_state in ("yes", "store")]


def _command(row: Row, machine: LocalMachine) -> str:
    """Return how to chat with a model of this machine."""
    alias = row.entry.alias
    if row.hosts_needed == 1:
        return f"`kimi-mlx chat {alias}`"
    kind = "Macs" if machine.is_mac else "machines"
    return f"`kimi-mlx launch --hosts ... chat {alias}`, on several {kind}"
