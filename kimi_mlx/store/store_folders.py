"""Folders of shard stores: their paths, and the sources that are recorded in them.

<stores>/<source>/<commit>/<strategy>-<ranks>-<digest>/    config.json, tokenizer, and for each rank
    rank-0/    manifest.json, journal.jsonl, layer-000.safetensors, layer-001.experts.safetensors ... top.safetensors,
               vision.safetensors
    rank-1/    the same without vision.safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from kimi_mlx.parallel.placement import Placement
from kimi_mlx.store.manifest import MANIFEST_NAME, Manifest, Origin

JOURNAL_NAME = "journal.jsonl"

RECORDS_SUFFIX = ".experts.safetensors"
"""Suffix of files whose routed experts are records."""

MAX_NAME_BYTES = 200
"""Maximum length of a folder name; file systems allow 255."""


def file_name(number: int, num_layers: int, has_records: bool) -> str:
    """Return the file name of a layer; the top follows the last layer, and the vision tower the top.

    Args:
        number: number of the file.
        num_layers: number of layers.
        has_records: whether its routed experts are records. The layouts of a layer have different names, so that the
            manifest says at any time which of them is valid.
    """
    names = {num_layers: "top.safetensors", num_layers + 1: "vision.safetensors"}
    suffix = RECORDS_SUFFIX if has_records else ".safetensors"
    return names.get(number, f"layer-{number:03}{suffix}")


def source_folder(stores: Path, source: str) -> Path:
    """Return the folder of all stores of a source. Different sources have different folders.

    Earlier versions gave the folder `/owner/name` and the repository `owner/name` the same name. Existing stores of a
    folder stay there: each store records its source.

    Args:
        stores: root folder of all stores.
        source: repository on the hub, or absolute path of a folder.
    """
    earlier = stores / _shorten(source.strip("/").replace("/", "--"), source)
    if not source.startswith("/") or source in sources_in(earlier):  # `--` is in no name on the hub
        return earlier
    name = source.rpartition("/")[2]
    return stores / f"folder--{_shorten(name, source)}--{_digest(source)}"


def _shorten(name: str, source: str) -> str:
    return name if len(os.fsencode(name)) <= MAX_NAME_BYTES else f"{name[-32:]}-{_digest(source)}"


def _digest(source: str) -> str:
    return hashlib.sha256(os.fsencode(source)).hexdigest()[:12]


def commit_folder(stores: Path, origin: Origin) -> Path:
    """Return the folder of all stores of one commit."""
    return source_folder(stores, origin.repository) / origin.commit[:12]


def placement_folder(stores: Path, origin: Origin, placement: Placement) -> Path:
    """Return the folder of one placement's stores."""
    prefix = folder_prefix(placement.strategy, placement.world_size)
    return commit_folder(stores, origin) / f"{prefix}{placement.digest}"


def rank_folder(folder: Path, rank: int) -> Path:
    """Return the folder of one rank's store."""
    return folder / f"rank-{rank}"


def folder_prefix(strategy: str, world_size: int) -> str:
    """Return the common prefix of the folder names of a strategy's placements."""
    return f"{strategy.replace(':', '_')}-{world_size}-"


def read_folder_name(name: str) -> tuple[str, int] | None:
    """Return strategy and number of ranks of a placement's folder; None for other folders."""
    parts = name.rsplit("-", 2)
    return (parts[0].replace("_", ":"), int(parts[1])) if len(parts) == 3 and parts[1].isdecimal() else None


def stored_ranks(folder: Path) -> list[int]:
    """Return the ranks with complete stores in a placement's folder."""
    numbers = (manifest.parent.name.removeprefix("rank-") for manifest in folder.glob(f"rank-*/{MANIFEST_NAME}"))
    return sorted(int(number) for number in numbers if number.isdigit())


def sources_in(folder: Path) -> set[str]:
    """Return the sources of the stores in a folder, complete or not; stores without a readable record are skipped."""
    ranks = folder.glob("*/*/rank-*")
    return {source for rank in ranks if (source := _recorded_source(rank)) is not None}


def _recorded_source(folder: Path) -> str | None:
    """Return the source in the journal of a rank's store, else in its manifest; None if both are unreadable."""
    for read in (_source_in_journal, _source_in_manifest):
        try:
            return str(read(folder))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _source_in_journal(folder: Path) -> str:
    with (folder / JOURNAL_NAME).open("rb") as stream:
        return json.loads(stream.readline())["repository"]


def _source_in_manifest(folder: Path) -> str:
    return json.loads((folder / MANIFEST_NAME).read_bytes())["origin"]["repository"]


def is_same_source(first: str, second: str) -> bool:
    """Return whether two sources are the same; the hub ignores the case of repository names."""
    is_folder = first.startswith("/") or second.startswith("/")
    return first == second if is_folder else first.lower() == second.lower()


def download_command(name: str, ranks: int, strategy: str) -> str:
    """Return the command that downloads a placement's stores, or resumes the download."""
    option = "" if strategy == "hybrid" else f" --strategy {strategy}"
    return f"kimi-mlx download {name} --ranks {ranks}{option}"


def repair_hint(manifest: Manifest) -> str:
    """Return the hint for repairing a store."""
    placement = manifest.placement
    command = download_command(manifest.origin.repository, placement.world_size, placement.strategy)
    return f"repair it with `{command} --verify`"
