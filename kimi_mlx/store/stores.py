"""Shard stores: one rank's share of a model on disk, in the form in which it is loaded. Find, check and load them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from kimi_mlx.errors import KimiMlxError, WeightsError
from kimi_mlx.files import sha256_of
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.decoder import Communicator, Model
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.parallel.placement import Placement
from kimi_mlx.store.experts import expert_sources
from kimi_mlx.store.layer_file import open_layer_file
from kimi_mlx.store.manifest import MANIFEST_NAME, Manifest, Origin, StoredFile, read_manifest
from kimi_mlx.store.store_folders import (
    download_command,
    is_same_source,
    rank_folder,
    repair_hint,
    source_folder,
    stored_ranks,
)
from kimi_mlx.weights.assemble import ProgressCallback, build_model
from kimi_mlx.weights.dequantize import FLOAT_NAMES
from kimi_mlx.weights.expert_reader import ExpertReader
from kimi_mlx.weights.expert_stack import ExpertStacks
from kimi_mlx.weights.streamed_experts import ExpertStreaming


@dataclass(frozen=True)
class LocalStore:
    """Stores of one placement on this machine.

    Args:
        folder: folder of the placement.
        origin: repository and commit.
        placement: shares of all ranks.
        ranks: ranks whose stores are complete.
    """

    folder: Path
    origin: Origin
    placement: Placement
    ranks: tuple[int, ...]


def find_stores(stores: Path, source: str) -> list[LocalStore]:
    """Return all complete stores of a repository or folder, newest first; unreadable ones are skipped."""
    dated_stores: list[tuple[float, LocalStore]] = []
    for folder in source_folder(stores, source).glob("*/*-*-*"):
        ranks = stored_ranks(folder)
        if not ranks or not (folder / "config.json").is_file():
            continue
        path = rank_folder(folder, ranks[0])
        try:
            manifest = read_manifest(path)
        except KimiMlxError:
            continue
        if is_same_source(manifest.origin.repository, source):
            store = LocalStore(folder, manifest.origin, manifest.placement, tuple(ranks))
            dated_stores.append(((path / MANIFEST_NAME).stat().st_mtime, store))
    return [store for _, store in sorted(dated_stores, key=lambda item: -item[0])]


def open_manifest(folder: Path, rank: int, world_size: int, strategy: str) -> Manifest:
    """Read and check the manifest of one rank of a placement's folder.

    Raises:
        WeightsError: no store for this rank, another placement, or a file that is missing or has another size.
    """
    manifest = read_manifest(rank_folder(folder, rank))
    placement = manifest.placement
    if (placement.world_size, placement.strategy, manifest.rank) != (world_size, strategy, rank):
        raise WeightsError(
            f"the store `{rank_folder(folder, rank)}` is of rank {manifest.rank} of {placement.world_size} in the "
            f"placement `{placement.strategy}`, not of rank {rank} of {world_size} in `{strategy}`",
            hint=f"use `--ranks {placement.world_size} --strategy {placement.strategy}`, or build the other one: "
            f"`{download_command(manifest.origin.repository, world_size, strategy)}`",
        )
    for file in manifest.all_files:
        _check_size(rank_folder(folder, rank), file, manifest)
    return manifest


def load_store(
    folder: Path,
    manifest: Manifest,
    config: ModelConfig,
    dtype: mx.Dtype,
    communicator: Communicator | None = None,
    progress: ProgressCallback = lambda done, total: None,
    streaming: ExpertStreaming | None = None,
) -> Model:
    """Load a rank's store layer by layer, without slicing or copying.

    Args:
        folder: folder of the placement.
        manifest: manifest of the rank, from open_manifest.
        config: the model's configuration.
        dtype: compute dtype.
        communicator: the rank's link to the others; None without others.
        progress: callback after each layer.
        streaming: how routed experts are streamed; None to load all of them.

    Raises:
        WeightsError: a file differs from the manifest.
    """
    path, hint = rank_folder(folder, manifest.rank), repair_hint(manifest)
    sources = expert_sources(folder, manifest) if streaming is None else []
    records = [source for source in sources if source.tag is not None]
    reader = ExpertReader(records, FLOAT_NAMES[dtype], uses_page_cache=True)
    stacks = ExpertStacks(reader, dtype, {layer: manifest.files[layer].num_fused_shared for layer in reader.sources})

    def layers() -> Iterator[LayerWeights]:
        for layer, file in enumerate(manifest.files):
            weights = open_layer_file(path / file.name, file, dtype, hint, streaming is None)
            yield stacks.complete(layer, weights) if layer in reader.sources else weights

    vision = LayerWeights({})
    if manifest.vision is not None:
        vision = open_layer_file(path / manifest.vision.name, manifest.vision, dtype, hint, streaming is None)
    try:
        return build_model(config, layers(), vision, communicator, progress, streaming)
    finally:
        reader.close()


def broken_files(folder: Path, manifest: Manifest, progress: Callable[[int], None] = lambda delta: None) -> list[str]:
    """Return the files of a rank's store whose size or checksum differs from the manifest. Reads all files."""
    broken: list[str] = []
    for file in manifest.all_files:
        path = rank_folder(folder, manifest.rank) / file.name
        try:
            is_whole = path.stat().st_size == file.size_bytes and sha256_of(path, progress) == file.sha256
        except OSError:
            is_whole = False
        if not is_whole:
            broken.append(file.name)
    return broken


def files_of_wrong_size(folder: Path, manifest: Manifest) -> list[str]:
    """Return the files of a rank's store that are missing or have the wrong size."""
    files = {file.name: rank_folder(folder, manifest.rank) / file.name for file in manifest.all_files}
    sizes = {name: path.stat().st_size if path.is_file() else None for name, path in files.items()}
    return [file.name for file in manifest.all_files if sizes[file.name] != file.size_bytes]


def _check_size(folder: Path, file: StoredFile, manifest: Manifest) -> None:
    path = folder / file.name
    size = path.stat().st_size if path.is_file() else None
    if size != file.size_bytes:
        state = "is missing" if size is None else f"has {size} bytes, not {file.size_bytes}"
        raise WeightsError(f"the store's file `{path}` {state}", hint=repair_hint(manifest))
