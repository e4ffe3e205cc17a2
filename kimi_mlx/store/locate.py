"""Find a model on this machine: in the package, a folder, the hub's cache or shard stores."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from kimi_mlx.errors import WeightsError
from kimi_mlx.folders import stores_folder
from kimi_mlx.hub.cache import repository_folder
from kimi_mlx.hub.catalogue import CatalogueEntry
from kimi_mlx.hub.client import complete_checkpoint, fetch_checkpoint, find_local, find_repository
from kimi_mlx.hub.environment import check_folder_variable
from kimi_mlx.parallel.placement import normalize_strategy
from kimi_mlx.store.folder_source import FolderSource
from kimi_mlx.store.journal import partial_stores
from kimi_mlx.store.manifest import read_manifest
from kimi_mlx.store.model_ref import ModelRef, repository_of, resolve_model_name
from kimi_mlx.store.store_folders import download_command, rank_folder, read_folder_name, stored_ranks
from kimi_mlx.store.stores import LocalStore, find_stores

STORES_VARIABLE = "KIMI_MLX_STORES"

LocalState = Literal["package", "yes", "store", "partly", "no"]
"""Part of a model on this machine: bundled, complete in the hub's cache, a store, a partial download, or nothing."""


def stores_root() -> Path:
    """Return the root folder of all stores.

    Raises:
        WeightsError: the user has no home folder.
        UsageError: KIMI_MLX_STORES is broken.
    """
    if os.environ.get(STORES_VARIABLE):
        check_folder_variable(STORES_VARIABLE)
    folder = stores_folder()
    if folder is None:
        raise WeightsError("there is no home folder to keep weights in", hint="set KIMI_MLX_STORES to a folder")
    return folder


def find_local_model(model: ModelRef, ranks: int, strategy: str = "hybrid", rank: int | None = None) -> Path | None:
    """Return the folder of a model on this machine; None if it must be downloaded.

    Args:
        model: the model.
        ranks: number of ranks that share the model.
        strategy: strategy of the placement.
        rank: rank whose store must be on this machine; None for all ranks.

    Raises:
        WeightsError: the model is here, but its store is broken or for another number of ranks.
    """
    strategy = normalize_strategy(strategy, ranks)
    needed_ranks = None if rank is None else [rank]
    if model.folder is not None:
        store = _store_of_folder(model.folder, ranks, strategy, needed_ranks)
        return model.folder if store is None else store.folder
    assert model.repository is not None
    store = find_store(stores_root(), model.repository, ranks, strategy, None, needed_ranks)
    if store is not None:
        return store.folder
    folder = find_local(model.repository)
    if folder is None:
        _refuse_other_stores(model, model.repository, ranks, strategy)
    return folder


def config_folder(model: ModelRef) -> Path | None:
    """Return the folder with a model's configuration; None if it is not on this machine."""
    if model.repository is None:
        return model.folder
    if (folder := find_local(model.repository)) is not None:
        return folder
    root = stores_folder()
    stores = find_stores(root, model.repository) if root is not None else []
    return stores[0].folder if stores else None


def stored_strategy(model: ModelRef, ranks: int) -> str | None:
    """Return the strategy of a model's newest store for this number of ranks; complete stores come first.

    None if there is no store: the model can then run in any strategy without a new download.
    """
    stores = stores_folder()
    if stores is None:
        return None
    if model.folder is not None:
        store = _store_of_folder(model.folder, ranks, None, None)
        name = str(model.folder.resolve())
    else:
        assert model.repository is not None
        name = model.repository
        store = find_store(stores, name, ranks, None)
    if store is not None:
        return store.placement.strategy
    parsed = (read_folder_name(folder.name) for folder in partial_stores(stores, name, ranks, None))
    return next((strategy_and_ranks[0] for strategy_and_ranks in parsed if strategy_and_ranks is not None), None)


def _store_of_folder(
    folder: Path, ranks: int, strategy: str | None, needed_ranks: Collection[int] | None
) -> LocalStore | None:
    """Return the store built from the current contents of a folder; None if there is none."""
    stores, name = stores_folder(), str(folder.resolve())
    if stores is None or find_store(stores, name, ranks, strategy, None, needed_ranks) is None:
        return None
    origin = FolderSource(folder).contents.origin
    return find_store(stores, name, ranks, strategy, origin.commit, needed_ranks)


def find_store(
    stores: Path,
    repository: str,
    ranks: int,
    strategy: str | None,
    revision: str | None = None,
    needed_ranks: Collection[int] | None = None,
) -> LocalStore | None:
    """Return the newest store of a repository or folder for this number of ranks.

    Args:
        stores: root folder of all stores.
        repository: repository on the hub, or path of a folder.
        ranks: number of ranks that share the model.
        strategy: strategy of the placement; None for any.
        revision: commit; None for any.
        needed_ranks: ranks whose stores must be complete on this machine; None for all.
    """
    required = set(range(ranks) if needed_ranks is None else needed_ranks)
    for store in find_stores(stores, repository):
        has_placement = store.placement.world_size == ranks and strategy in (None, store.placement.strategy)
        if has_placement and required <= set(store.ranks) and revision in (None, store.origin.commit):
            return store
    return None


def _refuse_other_stores(model: ModelRef, repository: str, ranks: int, strategy: str) -> None:
    """Raise an error, instead of a second download, for an incomplete store or a store of another placement."""
    command = f"`{download_command(model.name, ranks, strategy)}`"
    for folder in partial_stores(stores_root(), repository, ranks, strategy):
        complete = stored_ranks(folder)
        missing = [rank for rank in range(ranks) if rank not in complete]
        for rank in complete:
            read_manifest(rank_folder(folder, rank))
        if not complete or any(rank_folder(folder, rank).exists() for rank in missing):
            raise WeightsError(f"the store `{folder}` is not complete", hint=f"resume it with {command}")
        raise WeightsError(
            f"this machine has `{model.name}` for rank {_join(complete)} of {ranks}, but not for rank {_join(missing)}",
            hint=f"run it on the hosts that have the others: `kimi-mlx launch --hosts ... chat {model.name}`; "
            f"{command} builds the rest on this machine",
        )
    for store in find_stores(stores_root(), repository):
        stored = store.placement
        is_same_size = stored.world_size == ranks
        on_disk, requested = (stored.strategy, strategy) if is_same_size else (f"{stored.world_size} ranks", str(ranks))
        option = f"--strategy {stored.strategy}" if is_same_size else f"--ranks {stored.world_size}"
        raise WeightsError(
            f"`{model.name}` is on this machine as a store for {on_disk}, not for {requested}",
            hint=f"use `{option}`, or {command}",
        )


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def ensure_downloaded(name: str, ranks: int = 1, strategy: str = "hybrid", rank: int | None = None) -> Path:
    """Return the folder of a model; download it if it is not on this machine.

    Raises:
        UsageError: unknown or unsupported model.
        WeightsError: the repository cannot be downloaded.
    """
    model = resolve_model_name(name)
    folder = find_local_model(model, ranks, strategy, rank)
    if folder is None:
        assert model.repository is not None
        return fetch_checkpoint(find_repository(model.repository))
    return folder if model.repository is None else complete_checkpoint(model.repository, folder)


def local_state(entry: CatalogueEntry) -> tuple[LocalState, Path | None]:
    """Return which part of a known model is on this machine, and its folder."""
    if entry.is_packaged:
        return "package", entry.packaged_folder()
    repository = repository_of(entry)
    if repository is None:
        return "no", None
    if (folder := find_local(repository)) is not None:
        return "yes", folder
    root = stores_folder()
    if root is not None and (stores := find_stores(root, repository)):
        return "store", stores[0].folder
    folder = repository_folder(repository)
    has_files = any(folder.glob("blobs/*")) or any(folder.glob("snapshots/*/*"))
    return ("partly", folder) if has_files else ("no", None)
