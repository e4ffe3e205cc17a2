"""`kimi-mlx models`: known models, their requirements, and their state on this machine. Needs no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mlx.cli.options import JsonOption
from kimi_mlx.errors import UsageError

if TYPE_CHECKING:
    from kimi_mlx.hub.catalogue import CatalogueEntry


def models(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Alias or repository to show in detail. Default: list all models."),
    ] = None,
    sources: Annotated[bool, typer.Option("--sources", help="Also show where the facts of MODEL come from.")] = False,
    json: JsonOption = False,
) -> None:
    """List known models: size, memory, what is here."""
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.models_table import Row, find_row, print_details, print_table
    from kimi_mlx.cli.output import hides_messages, print_json, slow_status
    from kimi_mlx.cluster.hosts.machine import local_machine
    from kimi_mlx.hub.catalogue import catalogue

    machine = local_machine()
    if model is None:
        rows: list[Row] = []
        with slow_status(hides_messages(json)) as set_status:
            for entry in catalogue():
                set_status(f"looking for {entry.alias} on this machine")
                rows.append(find_row(entry, machine))
        if json:
            print_json([row.to_dict() for row in rows])
        else:
            print_table(rows, machine)
        return
    row = find_row(_find_entry(model), machine)
    if json:
        print_json(row.to_dict())
    else:
        print_details(row, machine, has_sources=sources)


def _find_entry(name: str) -> CatalogueEntry:
    """Return the catalogue entry of a model.

    Raises:
        UsageError: the model is not in the catalogue.
    """
    from kimi_mlx.hub.catalogue import find_entry
    from kimi_mlx.store.model_ref import resolve_model_name

    entry = find_entry(name)
    if entry is not None:
        return entry
    target = resolve_model_name(name)
    if target.draft is not None:
        raise UsageError(
            f"`{name}` is the draft model of `{target.draft.model}`",
            hint=f"`kimi-mlx models {target.draft.model}` shows it; `kimi-mlx download {name}` fetches the draft",
        )
    if target.folder is not None:
        raise UsageError(
            f"`{name}` is a folder, and not in the list of known models",
            hint=f"`kimi-mlx doctor {name}` checks whether it fits this machine, `kimi-mlx chat {name}` runs it",
        )
    raise UsageError(
        f"`{name}` is not a known model", hint=f"`kimi-mlx download {name} --dry-run` shows its size on Hugging Face"
    )
