"""`kimi-mlx rm`: remove the downloads and stores of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mlx.cli.options import JsonOption
from kimi_mlx.errors import WeightsError
from kimi_mlx.units import format_bytes

if TYPE_CHECKING:
    from kimi_mlx.store.model_ref import ModelRef
    from kimi_mlx.store.remove import RemovableFolder


def rm(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An alias, a folder that stores were built from, or a repository.")
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    json: JsonOption = False,
) -> None:
    """Remove a model's downloads and stores."""
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.confirm import confirm
    from kimi_mlx.cli.output import hides_messages, print_json, slow_status, stderr, stdout
    from kimi_mlx.store.model_ref import resolve_model_name
    from kimi_mlx.store.remove import check_unused, find_removable, remove

    target = resolve_model_name(model)
    with slow_status(hides_messages(json)) as set_status:
        set_status(f"looking for what is here of {target.name}")
        folders = find_removable(target)
    if not folders:
        raise _nothing_here(target)
    check_unused(folders)
    total = sum(folder.size_bytes for folder in folders)
    if not json:
        for folder in folders:
            stderr.print(_describe(folder), markup=False, highlight=False, soft_wrap=True)
    if not yes:
        confirm(f"Remove {format_bytes(total)}?", "nothing is removed", is_quiet=json)
        check_unused(folders)  # again: a download may have started during the question
    with slow_status(hides_messages(json)) as set_status:
        for number, folder in enumerate(folders, start=1):
            set_status(f"removing folder {number} of {len(folders)}: {folder.folder}")
            remove(folder)
    if json:
        print_json(
            {
                "model": model,
                "removed": [
                    {"kind": folder.kind, "folder": str(folder.folder), "size_bytes": folder.size_bytes}
                    for folder in folders
                ],
                "freed_bytes": total,
            }
        )
    else:
        stdout.print(f"removed {format_bytes(total)} of {model}", markup=False, highlight=False)


def _nothing_here(target: ModelRef) -> WeightsError:
    """Return the error for a model that has no stores and no download."""
    from kimi_mlx.folders import stores_folder

    if target.repository is None:
        return WeightsError(
            f"no stores of `{target.name}` are on this machine",
            hint=f"stores are in `{stores_folder()}`; the folder itself is never removed",
        )
    return WeightsError(
        f"nothing of `{target.name}` is on this machine", hint="`kimi-mlx models` shows which models are here"
    )


def _describe(folder: RemovableFolder) -> str:
    kind = {"store": "stores", "download": "Hugging Face cache"}[folder.kind]
    return f"{format_bytes(folder.size_bytes):>10}  {kind}: {folder.folder}"
