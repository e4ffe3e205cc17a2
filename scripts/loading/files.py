"""Files of the loading benchmark: a checkpoint of K2's shape, a copy for each rank, and stores; also cold caches.

Each rank reads its own copy, as on separate hosts: ranks that read the same file would share its page cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_mlx.bench.workloads import BITS, COMMON, FORMAT, GROUP_SIZE, SEED, Config, write_synthetic
from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.files import CHUNK_BYTES
from kimi_mlx.folders import cache_folder
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.store.download import StoreOptions, build, open_build_job
from kimi_mlx.store.manifest import read_manifest
from kimi_mlx.store.rewrite import rewrite_store
from kimi_mlx.store.store_folders import rank_folder
from kimi_mlx.units import GB, format_bytes

Progress = Callable[[str, int, int], None]
"""Callback with the current action, the amount done, and the total."""

WIDTHS = (2048, 1024, 512, 256)
"""Possible hidden sizes; the largest with at least MOE_LAYERS layers is used."""

MOE_LAYERS = 8
EXPERTS = 96

BYTES_PER_VALUE = BITS / 8 + 2 * 2 / GROUP_SIZE
"""4 bits, plus a bfloat16 scale and bias per group."""

DROP_CACHES = Path("/proc/sys/vm/drop_caches")

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"},
}
"""The smallest file that transformers accepts: mlx-lm's loader requires a tokenizer."""


@dataclass(frozen=True)
class LoadingFiles:
    """Files that the sides of the benchmark read.

    Args:
        copies: checkpoint folder of each rank.
        stores: folder with the stores of all ranks.
        checkpoint_bytes: size of the safetensors files of one copy.
        expert_bytes: size of the routed experts in them.
        store_bytes: size of each rank's store.
    """

    copies: tuple[Path, ...]
    stores: Path
    checkpoint_bytes: int
    expert_bytes: int
    store_bytes: tuple[int, ...]


def loading_config(size_gb: float) -> Config:
    """Return the `config.json` of a checkpoint of at least this size, with over 90 % in experts, as in K2."""
    size = size_gb * GB
    hidden = next((width for width in WIDTHS if size >= MOE_LAYERS * _moe_layer_bytes(width)), WIDTHS[-1])
    return {
        **COMMON,
        "vocab_size": 2 * hidden,
        "num_hidden_layers": 1 + max(2, -int(-size // _moe_layer_bytes(hidden))),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": hidden // 2,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "num_attention_heads": max(hidden // 256, 2),
        "num_key_value_heads": max(hidden // 256, 2),
        "q_lora_rank": hidden // 4,
        "kv_lora_rank": max(hidden // 8, GROUP_SIZE),
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_scaling": None,  # transformers, which loads mlx-lm's tokenizer, fails on YaRN in a `kimi_k2` config
    }


def _moe_layer_bytes(hidden: int) -> float:
    """Return the size of a layer's experts, whose width is half the hidden size."""
    return EXPERTS * 3 * hidden * (hidden // 2) * BYTES_PER_VALUE


def make_files(size_gb: float, ranks: int, progress: Progress = lambda action, done, total: None) -> LoadingFiles:
    """Create the missing ones of checkpoint, copies and stores in the user's cache folder.

    Raises:
        UsageError: fewer than two ranks, or a size that is not above 0.
        WeightsError: the disk is too small, or cannot be written.
        PlacementError: the checkpoint cannot be split over this many ranks.
    """
    if ranks < 2 or size_gb <= 0:
        raise UsageError("the loading benchmark needs at least two ranks and a size above 0")
    caches = cache_folder()
    if caches is None:
        raise WeightsError("no home folder to store the checkpoint in", hint="set XDG_CACHE_HOME")
    config = loading_config(size_gb)
    digest = hashlib.sha256(json.dumps([FORMAT, SEED, config], sort_keys=True).encode()).hexdigest()
    base = caches / "synthetic" / f"loading-{digest[:8]}"
    copies = [base / f"copy-{rank}" for rank in range(ranks)]
    try:
        base.mkdir(parents=True, exist_ok=True)
        _check_space(base, config, sum(not folder.is_dir() for folder in (*copies, base / "stores")))
        _make_once(copies[0], lambda part: _write(part, config, progress))
        for copy in copies[1:]:
            _make_once(copy, lambda part, copy=copy: _copy(copies[0], part, progress))
        stores = _make_stores(copies[0], base / "stores", ranks, progress)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError if it cannot write
        raise WeightsError(
            f"the benchmark's files in `{base}` cannot be written: {error}",
            hint="free some space, or set XDG_CACHE_HOME to another folder",
        ) from error
    size_bytes = sum(path.stat().st_size for path in copies[0].glob("*.safetensors"))
    store_bytes = tuple(read_manifest(rank_folder(stores, rank)).size_bytes for rank in range(ranks))
    return LoadingFiles(tuple(copies), stores, size_bytes, _expert_bytes(config), store_bytes)


def _expert_bytes(config: Config) -> int:
    return int((config["num_hidden_layers"] - 1) * _moe_layer_bytes(config["hidden_size"]))


def _check_space(folder: Path, config: Config, missing: int) -> None:
    """Raise an error if the disk cannot hold `missing` copies. A copy is little larger than its experts."""
    needed = int(1.1 * _expert_bytes(config)) * missing
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WeightsError(
            f"`{folder}` needs {format_bytes(needed)} more, but its disk has {format_bytes(free)} free",
            hint="free some space, use a smaller --size-gb, or set XDG_CACHE_HOME to a folder on a larger disk",
        )


def _make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Create a folder under a temporary name and rename it, so that `folder` is always complete."""
    if folder.is_dir():
        return
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".part"))
    try:
        make(part)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(folder: Path, config: Config, progress: Progress) -> None:
    write_synthetic(folder, config, lambda done, total: progress("creating the checkpoint", done, total))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def _copy(source: Path, target: Path, progress: Progress) -> None:
    """Copy the data: clones on a copy-on-write file system would share the page cache."""
    files = sorted(source.iterdir())
    total = sum(file.stat().st_size for file in files)
    done = 0
    for file in files:
        with file.open("rb") as reader, (target / file.name).open("wb") as writer:
            while chunk := reader.read(CHUNK_BYTES):
                writer.write(chunk)
                done += len(chunk)
                progress("copying it for each rank", done, total)


def _make_stores(checkpoint: Path, stores: Path, ranks: int, progress: Progress) -> Path:
    """Build the ranks' stores, except existing ones, and return their folder."""
    options = StoreOptions(checkpoint, stores, ranks)
    job = open_build_job(options, SingleGroup())
    build(
        options,
        job,
        SingleGroup(),
        lambda now: progress("building the stores", now.stored_bytes, now.total_bytes),
    )
    for rank in range(ranks):  # of an earlier version
        rewrite_store(rank_folder(job.folder, rank))
    return job.folder


def drop_caches(folders: Sequence[Path]) -> str:
    """Drop the page cache of the files in these folders, and return a description of the method."""
    if os.access(DROP_CACHES, os.W_OK):
        try:
            os.sync()
            DROP_CACHES.write_text("1")
            return f"page cache dropped ({DROP_CACHES})"
        except OSError:  # not permitted in some containers
            pass
    if not hasattr(os, "posix_fadvise"):
        return "page cache not dropped: the files may come from memory"
    for path in (path for folder in folders for path in folder.rglob("*.safetensors")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return "page cache of the files dropped (posix_fadvise)"
