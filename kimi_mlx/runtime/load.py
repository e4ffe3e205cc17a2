"""Load a model, or one rank's share of it, and identify its weights."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import UsageError
from kimi_mlx.hub.catalogue import find_entry
from kimi_mlx.model.config import ModelConfig, load_config
from kimi_mlx.model.config_quantization import PackedInts
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.device import device_kind
from kimi_mlx.model.draft_config import load_draft_config
from kimi_mlx.model.draft_model import DraftModel
from kimi_mlx.model.draft_quantization import load_quantization
from kimi_mlx.parallel.all_ranks import check_same_on_all_ranks
from kimi_mlx.parallel.communicator import RankCommunicator
from kimi_mlx.parallel.group import Group, MlxGroup, gather_on_host
from kimi_mlx.parallel.pipeline_communicator import PipelineCommunicator
from kimi_mlx.parallel.placement import Placement, normalize_strategy, place
from kimi_mlx.parallel.sum_communicator import SumCommunicator
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.runtime.expert_streaming import ExpertUseFile, open_streaming
from kimi_mlx.store.experts import expert_sources
from kimi_mlx.store.locate import ensure_downloaded
from kimi_mlx.store.store_folders import download_command, rank_folder, stored_ranks
from kimi_mlx.store.stores import load_store, open_manifest
from kimi_mlx.store.vision import name_of_checkpoint
from kimi_mlx.weights.assemble import ProgressCallback, load_model
from kimi_mlx.weights.draft import load_draft
from kimi_mlx.weights.expert_source import checkpoint_sources
from kimi_mlx.weights.index import INDEX_NAME, read_weight_map, vision_only_files
from kimi_mlx.weights.layer_plan import split_granularity_of
from kimi_mlx.weights.reader import open_checkpoint

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load(
    name: str | os.PathLike[str] = "kimi-mini",
    dtype: str | None = None,
    group: Group | mx.distributed.Group | None = None,
    strategy: str = "hybrid",
    *,
    expert_memory: int | None = None,
) -> tuple[Model, ChatTokenizer]:
    """Load a model and its tokenizer.

    Args:
        name: folder, alias such as `kimi-mini`, or repository of the hub.
        dtype: type to compute in: `float32`, `bfloat16` or `float16`. None is the checkpoint's own type on a GPU, and
            float32 on the CPU.
        group: ranks that share the model, as `mx.distributed.init()` returns them; each rank loads its own share.
        strategy: split of the model: `hybrid`, `tensor`, `expert` or `pipeline`, with weights for uneven shares
            (`hybrid:3:1`). In a pipeline only rank 0 gets logits.
        expert_memory: bytes for routed experts, see load_share; None keeps all in memory. Call such a model's
            `close` at the end.

    Returns:
        The model and its tokenizer. If the checkpoint has no chat template or no tokenizer, the ChatTokenizer raises a
        TextError when one is needed.

    Raises:
        KimiMlxError: there is no such model, or files are missing or broken, or `group` is not a group.
    """
    if isinstance(group, mx.distributed.Group):
        group = MlxGroup(group) if group.size() > 1 else None
    elif group is not None and not all(isinstance(getattr(group, name, None), int) for name in ("rank", "size")):
        raise UsageError(
            f"group is a {type(group).__name__}, not a group", hint="pass what `mx.distributed.init()` returns"
        )
    rank, world_size = (None, 1) if group is None else (group.rank, group.size)
    strategy = normalize_strategy(strategy, world_size)
    folder = ensure_downloaded(os.fspath(name), world_size, strategy, rank)
    entry = find_entry(os.fspath(name))
    tokenizer = ChatTokenizer.load(folder, entry.default_sampling() if entry else None)
    model = load_share(folder, load_config(folder), dtype, group, strategy=strategy, expert_memory=expert_memory)
    return model, tokenizer


def load_share(
    folder: Path,
    config: ModelConfig,
    dtype: str | None = None,
    group: Group | None = None,
    progress: ProgressCallback = lambda done, total: None,
    strategy: str = "hybrid",
    *,
    expert_memory: int | None = None,
) -> Model:
    """Load one rank's share of a model; the whole model without a group, or with a group of one.

    It returns when all ranks have loaded their shares.

    Args:
        folder: checkpoint, or store of this rank.
        config: configuration of the model.
        dtype: type to compute in; None uses the default, see `load`.
        group: ranks that share the model.
        progress: callback with the layers loaded and the number of layers.
        strategy: split of the model.
        expert_memory: bytes for this rank's routed experts: slots and staging area (kimi_mlx.model.expert_budget).
            Experts that do not fit are read from disk when a token needs them. None keeps all in memory. Ranks may
            differ.

    Raises:
        KimiMlxError: files are missing or broken, or differ between the ranks.
        WeightsError: with `expert_memory`, also that this rank's share of an expert cannot be read from a checkpoint in
            one piece; build a store then.
    """
    resolved_dtype = compute_dtype(dtype, config)
    strategy = normalize_strategy(strategy, 1 if group is None else group.size)
    load = _load_from_store if stored_ranks(folder) else _load_from_checkpoint
    model = load(folder, config, resolved_dtype, group, progress, strategy, expert_memory)
    if group is not None:
        streams = gather_on_host(group, np.array([model.streamer is not None]))  # also a barrier
        if isinstance(model.communicator, SumCommunicator):
            model.communicator.is_any_streaming = bool(streams.any())
    return model


def _load_from_store(
    folder: Path,
    config: ModelConfig,
    dtype: mx.Dtype,
    group: Group | None,
    progress: ProgressCallback,
    strategy: str,
    expert_memory: int | None,
) -> Model:
    rank, world_size = (0, 1) if group is None else (group.rank, group.size)
    manifest = open_manifest(folder, rank, world_size, strategy)
    identity = f"{manifest.origin.commit} {manifest.placement.digest}"
    communicator = None
    if group is not None and world_size > 1:
        check_same_on_all_ranks(
            group,
            identity,
            "revision or placement of the model",
            f"run `kimi-mlx download {manifest.origin.repository} --ranks {world_size}` on all hosts",
        )
        communicator = _communicator(group, manifest.placement, config, dtype)
    streaming = None
    if expert_memory is not None:
        use_file = ExpertUseFile(rank_folder(folder, rank), f"{identity} {rank}")
        command = download_command(manifest.origin.repository, world_size, strategy)
        streaming = open_streaming(expert_sources(folder, manifest), dtype, expert_memory, use_file, command)
    return load_store(folder, manifest, config, dtype, communicator, progress, streaming)


def _load_from_checkpoint(
    folder: Path,
    config: ModelConfig,
    dtype: mx.Dtype,
    group: Group | None,
    progress: ProgressCallback,
    strategy: str,
    expert_memory: int | None,
) -> Model:
    share = communicator = None
    rank, world_size, identity = 0, 1, str(folder.resolve())
    if group is not None and group.size > 1:
        rank, world_size = group.rank, group.size
        placement = place_checkpoint(folder, config, world_size, strategy)
        identity = _checkpoint_identity(folder, placement)
        check_same_on_all_ranks(
            group,
            identity,
            "checkpoint",
            "copy the same files to all hosts, or download them: `kimi-mlx launch --hosts ... download MODEL`",
        )
        share, communicator = placement.shares[rank], _communicator(group, placement, config, dtype)
    streaming = None
    if expert_memory is not None:
        checkpoint = open_checkpoint(folder, config).checkpoint
        name = name_of_checkpoint(folder)
        command = download_command(name, world_size, strategy)
        hint = f"build a store, from which each rank reads its part: `{command}`"
        if world_size > 1:
            hint += (
                f"; on several hosts `kimi-mlx launch --hosts ... download {name}`, or `--strategy pipeline`, whose "
                "ranks read whole experts"
            )
        sources = checkpoint_sources(checkpoint, share, hint)
        use_file = ExpertUseFile(None, f"{identity} {rank}")
        streaming = open_streaming(sources, dtype, expert_memory, use_file, command)
    return load_model(folder, config, dtype, share, communicator, progress, streaming)


def load_draft_model(folder: Path, model: Model, dtype: mx.Dtype | None = None) -> DraftModel:
    """Load a draft model for a loaded model, on the leader. Other ranks need only its `captured_layers`.

    On a GPU float matrices are quantized to 8 bits (kimi_mlx.model.draft_quantization).

    Args:
        folder: folder of the draft model.
        model: the model, or the leader's share of it.
        dtype: compute dtype; None for that of the model.

    Raises:
        ConfigError: the draft model is not supported, or is made for another model.
        WeightsError: its files are missing, broken or do not fit their `config.json`.
    """
    config = load_draft_config(folder)
    layers = config.captured_layers(model.config)
    quantization = load_quantization(device_kind())
    return load_draft(folder, config, dtype or model.dtype, layers, model.get("embed_tokens"), quantization)


def check_placement(folder: Path, config: ModelConfig, world_size: int, strategy: str) -> None:
    """Check that the model in `folder` can be split over this number of ranks, before any process is started.

    Raises:
        UsageError: the strategy does not exist.
        PlacementError: the model cannot be split this way.
        WeightsError: the store has another placement, or is incomplete.
    """
    strategy = normalize_strategy(strategy, world_size)
    if ranks := stored_ranks(folder):
        for rank in sorted({*ranks, *range(world_size)}):
            open_manifest(folder, rank, world_size, strategy)
    else:
        place_checkpoint(folder, config, world_size, strategy)


@dataclass(frozen=True)
class Fingerprint:
    """Identity of loaded weights, computed without reading all of them.

    Args:
        shared: digest of model, commit and placement; the same on all ranks.
        local: digest of the files on this host; it changes when they are written again.
    """

    shared: str
    local: str


def fingerprint(
    folder: Path, config: ModelConfig, rank: int = 0, world_size: int = 1, strategy: str = "hybrid"
) -> Fingerprint:
    """Return the fingerprint of the weights that `load_share` loads.

    Raises:
        KimiMlxError: as for `load_share`.
    """
    strategy = normalize_strategy(strategy, world_size)
    if stored_ranks(folder):
        manifest = open_manifest(folder, rank, world_size, strategy)
        checksums = " ".join(file.sha256 for file in manifest.files)
        return Fingerprint(f"{manifest.origin.commit} {manifest.placement.digest}", _digest(checksums))
    # A file in the hub's cache is a link to a file that is named by its content.
    files = [(file.name, file.resolve().name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    local = str([(name, target, status.st_size, status.st_mtime_ns) for name, target, status in files])
    placement = place_checkpoint(folder, config, world_size, strategy)
    return Fingerprint(_digest(_checkpoint_identity(folder, placement)), _digest(local))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def place_checkpoint(folder: Path, config: ModelConfig, world_size: int, strategy: str) -> Placement:
    """Return the placement of a checkpoint that is not stored as shares.

    Raises:
        PlacementError: the model cannot be split this way.
    """
    return place(
        config, strategy, world_size, split_granularity_of(open_checkpoint(folder, config).checkpoint, strategy)
    )


def _communicator(group: Group, placement: Placement, config: ModelConfig, dtype: mx.Dtype) -> RankCommunicator:
    if not placement.is_sharded("layers"):
        return SumCommunicator(group, placement)
    assert isinstance(group, MlxGroup)
    return PipelineCommunicator(group, config.hidden_size, dtype, [share.layers for share in placement.shares])


def _checkpoint_identity(folder: Path, placement: Placement) -> str:
    """Return the identity of a checkpoint without reading its tensors: placement, file sizes and configuration.

    Files with only a vision tower do not count: rank 0 alone needs them.
    """
    index = folder / INDEX_NAME
    vision = vision_only_files(read_weight_map(index)) if index.is_file() else set[str]()
    files = (file for file in folder.glob("*.safetensors") if file.name not in vision)
    sizes = sorted((file.name, file.stat().st_size) for file in files)
    return f"{placement.digest} {sizes} {(folder / 'config.json').read_text(encoding='utf-8')}"


def compute_dtype(dtype: str | None, config: ModelConfig) -> mx.Dtype:
    """Return the type to compute in.

    The default is the checkpoint's type on a GPU, and float32 on the CPU, where other types are 12 times slower.

    Raises:
        UsageError: the type is unknown, or MLX cannot run this checkpoint in it.
    """
    if dtype is None:
        dtype = config.dtype if mx.default_device().type == mx.DeviceType.gpu else "float32"
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype `{dtype}`", hint=f"use one of {', '.join(DTYPES)}")
    is_float = config.quantization is None and not isinstance(config.compression, PackedInts)
    if is_float and dtype != "float32" and mx.default_device().type == mx.DeviceType.cpu:
        raise UsageError(
            f"an unquantized checkpoint cannot run in {dtype} on the CPU: MLX computes experts there in float32 only",
            hint="use `--dtype float32`",
        )
    return DTYPES[dtype]


def prepare_device() -> None:
    """Set up MLX for a process that serves one model.

    On Metal the weights are wired, so that macOS does not page them out. On the CPU, also on that of a Mac, mx.compile
    is turned off: it would run a C++ compiler, and several ranks would write the same files at the same time.
    """
    kind = device_kind()
    if kind == "metal":
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    elif kind == "cpu":
        mx.disable_compile()
