"""Stores as earlier versions built them: experts in stacks, format 2."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.store.build_job import BuildJob
from kimi_mlx.store.download import StoreOptions, build, open_build_job
from kimi_mlx.store.journal import JOURNAL_NAME
from kimi_mlx.store.manifest import MANIFEST_NAME, Manifest, Origin, read_manifest
from kimi_mlx.store.store_folders import placement_folder, rank_folder
from kimi_mlx.store.writer import RankWriter


def build_all(source: Path, stores: Path, ranks: int, strategy: str = "hybrid") -> tuple[BuildJob, list[Manifest]]:
    """Build the stores of all ranks."""
    options = StoreOptions(source, stores, ranks, strategy)
    job = open_build_job(options, SingleGroup())
    return job, build(options, job, SingleGroup())


@contextmanager
def building_stacks() -> Generator[None]:
    """Write the files of stores as an earlier version did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankWriter, "_is_begun_with_stacks", lambda writer, number: writer._has_experts(number))
        yield


def build_with_stacks(
    source: Path, stores: Path, ranks: int, strategy: str = "hybrid", origin: Origin | None = None
) -> BuildJob:
    """Build the stores of all ranks as an earlier version did; as of another origin if one is given."""
    options = StoreOptions(source, stores, ranks, strategy)
    job = open_build_job(options, SingleGroup())
    if origin is not None:
        job.source.contents = replace(job.source.contents, origin=origin)
        job.folder = placement_folder(stores, origin, job.placement)
    with building_stacks():
        manifests = build(options, job, SingleGroup())
    for manifest in manifests:
        make_format_2(rank_folder(job.folder, manifest.rank))
    return job


def make_format_2(folder: Path) -> None:
    """Give a rank's manifest and journal the form of format 2."""
    for name in (MANIFEST_NAME, JOURNAL_NAME):
        path = folder / name
        if not path.is_file():
            continue
        lines = [path.read_text()] if name == MANIFEST_NAME else path.read_text().splitlines()
        values = [json.loads(line) for line in lines]
        values[0]["format"] = 2
        for value in values:
            if "file" in value:
                del value["name"]
        indent = 1 if name == MANIFEST_NAME else None
        text = "\n".join(json.dumps(value, indent=indent) for value in values)
        path.write_text(text if name == MANIFEST_NAME else text + "\n")


def read_manifests(job: BuildJob) -> list[Manifest]:
    """Return the manifests of all ranks."""
    return [read_manifest(rank_folder(job.folder, rank)) for rank in range(job.placement.world_size)]


def checksums(manifests: Sequence[Manifest]) -> list[list[str]]:
    """Return the checksums of all files."""
    return [[file.sha256 for file in manifest.all_files] for manifest in manifests]
