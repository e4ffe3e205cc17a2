"""Find a model: in the package, in a folder, in the hub's cache, in shard stores, or on the hub."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.folders import stores_folder
from kimi_mlx.hub.cache import repository_folder
from kimi_mlx.hub.catalogue import CatalogueEntry, catalogue, find_entry
from kimi_mlx.hub.client import fetch_checkpoint, find_local, look_up
from kimi_mlx.parallel.placement import normalize_strategy
from kimi_mlx.store.folder_source import FolderSource
from kimi_mlx.store.journal import partial_stores
from kimi_mlx.store.manifest import read_manifest
from kimi_mlx.store.stores import LocalStore, download_command, find_stores, rank_folder, read_folder_name, stored_ranks

NEAR_NAME_RATIO = 0.7
"""Similarity (difflib) from which a name counts as a misspelling: `kimi-k25` of `kimi-k2.5`, but not `llama` of any."""

LocalState = Literal["package", "yes", "store", "partly", "no"]


@dataclass(frozen=True)
class ModelRef:
    """A model name, resolved.

    Args:
        name: name as the user typed it.
        folder: folder that the name refers to, or that comes with the package; None if on the hub.
        repository: repository on the hub; None for a folder.
        entry: catalogue entry; None if not in the catalogue.
    """

    name: str
    folder: Path | None
    repository: str | None
    entry: CatalogueEntry | None

    @property
    def source(self) -> Path | str:
        """Folder, or else repository."""
        source = self.folder or self.repository
        assert source is not None
        return source


def resolve_model_name(name: str) -> ModelRef:
    """Resolve a model name, without network access.

    Args:
        name: alias, folder, or repository `owner/name`.

    Raises:
        UsageError: unknown name (the message suggests similar ones), or an unsupported model.
    """
    for entry in catalogue():
        if name == entry.alias and entry.refused is None:
            folder = entry.packaged_folder()
            if folder is not None and not (folder / "config.json").is_file():
                raise UsageError(f"`{name}` is missing from this installation", hint="install kimi-mlx again")
            return ModelRef(name, folder, entry.repository, entry)
    path = os.path.expanduser(name)
    if os.path.isdir(path):  # unlike Path.is_dir, returns False for invalid paths
        return ModelRef(name, Path(path), None, None)
    for entry in catalogue():
        if entry.refused is not None and _is_kind_of(entry, name):
            raise UsageError(
                f"`{name}` is of {entry.title}: {entry.refused}, not supported",
                hint="use a model of the K2 family: `kimi-mlx models` lists them",
            )
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/")):
        return ModelRef(name, None, name, find_entry(name))
    raise unknown_model_error(name)


def unknown_model_error(name: str) -> UsageError:
    """The error for a name that nothing has, with near names if there are any."""
    if name.startswith((".", "/", "~")):
        return UsageError(f"there is no folder `{name}`", hint="check the path; `kimi-mlx models` lists known models")
    near = near_aliases(name)
    question = f"did you mean {' or '.join(f'`{alias}`' for alias in near)}? " if near else ""
    return UsageError(
        f"there is no model `{name}`",
        hint=f"{question}`kimi-mlx models` lists the known models; a folder or a repository `owner/name` works too",
    )


def near_aliases(name: str) -> list[str]:
    """Return the aliases that a misspelled name may mean, the nearest first; none if all are far from it."""
    plain = {re.sub(r"[^a-z0-9]", "", entry.alias): entry.alias for entry in catalogue() if entry.refused is None}
    typed = re.sub(r"[^a-z0-9]", "", name.lower())
    near = difflib.get_close_matches(typed, plain, n=3, cutoff=NEAR_NAME_RATIO)
    if not near and len(typed) > 1:
        near = [text for text in plain if text.endswith(typed)]  # `k2.5`, `thinking`
    return [plain[text] for text in near]


def stores_root() -> Path:
    """Return the root folder of all stores.

    Raises:
        WeightsError: the user has no home folder.
    """
    folder = stores_folder()
    if folder is None:
        raise WeightsError("there is no home folder to keep weights in", hint="set KIMI_MLX_STORES to a folder")
    return folder


def find_local_model(target: ModelRef, ranks: int, strategy: str = "hybrid", rank: int | None = None) -> Path | None:
    """Return the folder of a model on this machine; None if it must be fetched.

    Args:
        target: the model.
        ranks: number of ranks that will share it.
        strategy: strategy of the placement.
        rank: rank whose store must be on this machine; None for all ranks.

    Raises:
        WeightsError: the model is here, but its store is broken or for another number of ranks.
    """
    strategy = normalize_strategy(strategy, ranks)
    needed = None if rank is None else [rank]
    if target.folder is not None:
        store = _store_of_folder(target.folder, ranks, strategy, needed)
        return target.folder if store is None else store.folder
    assert target.repository is not None
    store = find_store(stores_root(), target.repository, ranks, strategy, None, needed)
    if store is not None:
        return store.folder
    folder = find_local(target.repository)
    if folder is None:
        _refuse_other_stores(target, target.repository, ranks, strategy)
    return folder


def config_folder(target: ModelRef) -> Path | None:
    """Return the folder with a model's configuration; None if it is not on this machine."""
    if target.repository is None:
        return target.folder
    if (folder := find_local(target.repository)) is not None:
        return folder
    stores = stores_folder()
    found = find_stores(stores, target.repository) if stores is not None else []
    return found[0].folder if found else None


def stored_strategy(target: ModelRef, ranks: int) -> str | None:
    """Return the strategy of a model's newest store for this number of ranks; complete stores come first.

    None if there is no store: the model can then run in any strategy without a new download.
    """
    stores = stores_folder()
    if stores is None:
        return None
    if target.folder is not None:
        store = _store_of_folder(target.folder, ranks, None, None)
        name = str(target.folder.resolve())
    else:
        assert target.repository is not None
        name = target.repository
        store = find_store(stores, name, ranks, None)
    if store is not None:
        return store.placement.strategy
    begun = (read_folder_name(folder.name) for folder in partial_stores(stores, name, ranks, None))
    return next((found[0] for found in begun if found is not None), None)


def _store_of_folder(
    folder: Path, ranks: int, strategy: str | None, needed: Collection[int] | None
) -> LocalStore | None:
    """Return the store built from the current state of a folder; None if there is none."""
    stores, name = stores_folder(), str(folder.resolve())
    if stores is None or find_store(stores, name, ranks, strategy, None, needed) is None:
        return None
    origin = FolderSource(folder).contents.origin
    return find_store(stores, name, ranks, strategy, origin.commit, needed)


def find_store(
    stores: Path,
    repository: str,
    ranks: int,
    strategy: str | None,
    revision: str | None = None,
    needed: Collection[int] | None = None,
) -> LocalStore | None:
    """Return the newest store of a repository or folder for this number of ranks.

    Args:
        stores: root folder of all stores.
        repository: repository on the hub, or path of a folder.
        ranks: number of ranks that share the model.
        strategy: strategy of the placement; None for any.
        revision: commit; None for any.
        needed: ranks whose stores must be complete on this machine; None for all.
    """
    wanted = set(range(ranks) if needed is None else needed)
    for store in find_stores(stores, repository):
        is_meant = store.placement.world_size == ranks and strategy in (None, store.placement.strategy)
        if is_meant and wanted <= set(store.ranks) and revision in (None, store.origin.commit):
            return store
    return None


def _refuse_other_stores(target: ModelRef, repository: str, ranks: int, strategy: str) -> None:
    """Refuse to fetch the model again if there is a partial store, or one of another placement."""
    command = f"`{download_command(target.name, ranks, strategy)}`"
    for folder in partial_stores(stores_root(), repository, ranks, strategy):
        here = stored_ranks(folder)
        missing = [rank for rank in range(ranks) if rank not in here]
        for rank in here:
            read_manifest(rank_folder(folder, rank))
        if any(rank_folder(folder, rank).exists() for rank in missing) or not here:
            raise WeightsError(f"the store `{folder}` is not complete", hint=f"resume it with {command}")
        raise WeightsError(
            f"this machine holds `{target.name}` for rank {_list(here)} of {ranks}, but not for rank {_list(missing)}",
            hint=f"run it on the hosts that hold the others: `kimi-mlx launch --hosts ... chat {target.name}`; "
            f"{command} builds the rest here",
        )
    for store in find_stores(stores_root(), repository):
        other = store.placement
        is_same = other.world_size == ranks
        there, here = (other.strategy, strategy) if is_same else (f"{other.world_size} ranks", str(ranks))
        raise WeightsError(
            f"`{target.name}` is on this machine as a store for {there}, not for {here}",
            hint=f"use `{f'--strategy {there}' if is_same else f'--ranks {other.world_size}'}`, or {command}",
        )


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def ensure_downloaded(name: str, ranks: int = 1, strategy: str = "hybrid", rank: int | None = None) -> Path:
    """Return the folder of a model; fetch it from the hub if it is not on this machine.

    Raises:
        UsageError: unknown or unsupported model.
        WeightsError: the repository cannot be fetched.
    """
    target = resolve_model_name(name)
    folder = find_local_model(target, ranks, strategy, rank)
    if folder is not None:
        return folder
    assert target.repository is not None
    return fetch_checkpoint(look_up(target.repository))


def local_state(entry: CatalogueEntry) -> tuple[LocalState, Path | None]:
    """Return which part of a known model is on this machine, and its folder; no network access."""
    if entry.is_packaged:
        return "package", entry.packaged_folder()
    if entry.repository is None:
        return "no", None
    if (folder := find_local(entry.repository)) is not None:
        return "yes", folder
    stores = stores_folder()
    if stores is not None and (found := find_stores(stores, entry.repository)):
        return "store", found[0].folder
    begun = repository_folder(entry.repository)
    try:
        return ("partly", begun) if any((begun / "blobs").iterdir()) else ("no", None)
    except OSError:
        return "no", None


def _is_kind_of(entry: CatalogueEntry, name: str) -> bool:
    """Return whether a name, such as `mlx-community/Kimi_K3_4bit`, has the entry's version between dashes: `k3`."""
    mark = entry.alias.split("-")[-1]
    return mark in name.lower().replace("_", "-").split("/")[-1].split("-")
