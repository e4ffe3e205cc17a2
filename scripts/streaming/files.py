"""Files of the streaming benchmark: a store of one rank, in records, of a model of K2's shape with a skewed router.

Scales and biases of quantized weights are float32, the type that the CPU computes in, so that reading casts nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.bench.workloads import (
    COMMON,
    FORMAT,
    SEED,
    Config,
    Tensors,
    require_cache_folder,
    synthetic_error,
    write_synthetic,
)
from kimi_mlx.errors import UsageError
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.store.disk import check_space
from kimi_mlx.store.download import StoreOptions, build, open_build_job
from kimi_mlx.store.manifest import Manifest
from kimi_mlx.store.stores import open_manifest
from kimi_mlx.units import GB
from scripts.streaming.zipf import zipf_bias

Progress = Callable[[str, int, int], None]
"""Callback with the current action, the amount done, and the total."""

EXPERT_SHAPES: dict[int, Config] = {
    4: {"hidden_size": 2048, "moe_intermediate_size": 1024},
    32: {"hidden_size": 1024, "moe_intermediate_size": 320},
}
"""Shapes by bits of the experts' weights: an expert has 3.9 MB. K2's has 24.8 MB."""

MOE_LAYERS, EXPERTS_PER_TOKEN = 4, 8

BYTES_PER_VALUE = {4: 4 / 8 + 2 * 4 / 64, 32: 4.0}
"""By bits; 4 bits with a float32 scale and bias for each group of 64."""

EXPONENT = 0.8
"""Exponent of Zipf's law that the planner assumes."""


@dataclass(frozen=True)
class StreamingFiles:
    """Files of the benchmark.

    Args:
        folder: folder with the store of rank 0.
        use: file with the use of experts that an earlier run has learned; it may not exist yet.
        exponent: exponent of the popularity of experts.
        bits: bits of the experts' weights.
    """

    folder: Path
    use: Path
    exponent: float
    bits: int

    @property
    def manifest(self) -> Manifest:
        """Manifest of the store."""
        return open_manifest(self.folder, 0, 1, "hybrid")

    @property
    def size_bytes(self) -> int:
        """Size of the store."""
        return self.manifest.size_bytes


def streaming_config(size_gb: float, bits: int = 4, **changes: object) -> Config:
    """Return the `config.json` of a checkpoint whose experts take at least this size.

    Args:
        size_gb: size of the experts.
        bits: bits of their weights, a key of EXPERT_SHAPES.
        changes: fields to replace.
    """
    shape = EXPERT_SHAPES[bits]
    values = 3 * shape["hidden_size"] * shape["moe_intermediate_size"]
    num_experts = max(16, -int(-size_gb * GB // (MOE_LAYERS * values * BYTES_PER_VALUE[bits])))
    return {
        **COMMON,
        **shape,
        "torch_dtype": "float32",
        "vocab_size": 4096,
        "num_hidden_layers": 1 + MOE_LAYERS,
        "intermediate_size": 4096,
        "n_routed_experts": num_experts,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 512,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        **changes,
    }


def make_files(
    config: Config, bits: int = 4, exponent: float = EXPONENT, progress: Progress = lambda action, done, total: None
) -> StreamingFiles:
    """Create the store in the user's cache folder, if it does not exist. While it is built, it takes twice its size.

    Args:
        config: configuration, from streaming_config.
        bits: bits of the experts' weights.
        exponent: exponent of Zipf's law.
        progress: callback.

    Raises:
        UsageError: the exponent is negative.
        WeightsError: the disk is too small, or cannot be written.
    """
    if exponent < 0:
        raise UsageError("the exponent of the popularity of experts must be at least 0")
    identity = json.dumps([FORMAT, SEED, config, bits, exponent], sort_keys=True)
    base = require_cache_folder() / "synthetic" / f"streaming-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    stores, use = base / "stores", base / "expert_use.npz"
    try:
        if not stores.is_dir():
            base.mkdir(parents=True, exist_ok=True)
            check_space(base, int(2.1 * _expert_bytes(config, bits)))
            part = Path(tempfile.mkdtemp(dir=base, suffix=".part"))
            try:
                _make(part, config, bits, exponent, progress)
                use.unlink(missing_ok=True)
                os.replace(part / "stores", stores)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError if it cannot write
        raise synthetic_error(base, error) from error
    (manifest,) = stores.rglob("rank-0/manifest.json")
    return StreamingFiles(manifest.parents[1], use, exponent, bits)


def _expert_bytes(config: Config, bits: int) -> int:
    num_values = 3 * config["hidden_size"] * config["moe_intermediate_size"] * config["n_routed_experts"]
    return int((config["num_hidden_layers"] - 1) * num_values * BYTES_PER_VALUE[bits])


def _make(folder: Path, config: Config, bits: int, exponent: float, progress: Progress) -> None:
    """Write a checkpoint, and build the store from it."""
    random = np.random.default_rng(SEED)
    bias = zipf_bias(config["n_routed_experts"], config["num_experts_per_tok"], exponent)

    def change(tensors: Tensors) -> Tensors:
        changed = {name: _changed(name, tensor, bias, random) for name, tensor in tensors.items()}
        return changed if bits == 4 else _with_float_experts(changed, config, random)

    checkpoint = folder / "checkpoint"
    write_synthetic(checkpoint, config, lambda done, total: progress("creating the checkpoint", done, total), change)
    options = StoreOptions(checkpoint, folder / "stores", 1)
    build(
        options,
        open_build_job(options, SingleGroup()),
        SingleGroup(),
        lambda now: progress("building the store", now.stored_bytes, now.total_bytes),
    )


def _changed(name: str, tensor: mx.array, bias: np.ndarray, random: np.random.Generator) -> mx.array:
    """Return a tensor in float32; correction biases of a router in an order of their own in each layer."""
    if name.endswith("e_score_correction_bias"):
        return mx.array(random.permutation(bias))
    return tensor.astype(mx.float32) if tensor.dtype == mx.bfloat16 else tensor


def _with_float_experts(tensors: Tensors, config: Config, random: np.random.Generator) -> Tensors:
    """Return the tensors of a file with experts in float32."""
    hidden, width, num_experts = (config[name] for name in ("hidden_size", "moe_intermediate_size", "n_routed_experts"))
    others = {name: tensor for name, tensor in tensors.items() if ".switch_mlp." not in name}
    for name in tensors:
        if ".switch_mlp." in name and name.endswith(".weight"):
            rows, columns = (hidden, width) if ".down_proj." in name else (width, hidden)
            values = random.standard_normal((num_experts, rows, columns), np.float32)
            others[name] = mx.array(values * columns**-0.5)
    return others
