"""Compute the table of tensors of a published checkpoint from its dimensions, to plan without its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.config_quantization import Fp8Blocks, PackedInts, Quantization
from kimi_mlx.model.names import CheckpointLayout, SourceMatrix, TreeEntry, layer_entries, top_entries
from kimi_mlx.model.vision_names import vision_entries
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.header import TensorInfo

PublishedFormat = Literal["fp8", "int4", "mlx-4bit"]
"""Moonshot's FP8 (K2) and INT4 (K2-Thinking, K2.5 and later), or 4 bits in groups of 64 of MLX."""

FP8, INT4, MLX_4BIT = Fp8Blocks(128, 128), PackedInts(4, 32), Quantization(4, 64)

Tensors = Iterator[tuple[str, str, tuple[int, ...]]]
"""Names, types and shapes of tensors."""


def reference_checkpoint(config: ModelConfig, form: PublishedFormat, location: str) -> Checkpoint:
    """Return the table of a published checkpoint of a model with these dimensions; its files do not exist.

    Args:
        config: dimensions of the model.
        form: published format.
        location: name for messages.
    """
    if form == "mlx-4bit":
        config = replace(config, quantization=MLX_4BIT, compression=None, vision=None)
    else:
        config = replace(config, quantization=None, compression=FP8 if form == "fp8" else INT4)
    layout = CheckpointLayout(lambda name: False, lambda path: None)
    entries = top_entries(config)
    for layer in range(config.num_hidden_layers):
        entries += layer_entries(config, layer, layout, fuses_shared=False)
    tensors = dict[str, TensorInfo]()
    for source in _sources(entries):
        for path in source.paths:
            for name, dtype, shape in _stored(path, source, form):
                tensors[name] = TensorInfo(dtype, shape, Path("published"), 0)
    if config.vision is not None:
        for source in _sources(vision_entries(config.vision, layout)):
            shape = (source.shape[0], *source.kernel) if source.kernel is not None else source.shape
            tensors[source.paths[0] + source.suffix] = TensorInfo("BF16", shape, Path("published"), 0)
    return Checkpoint(config, tensors, location)


def _sources(entries: list[TreeEntry]) -> Iterator[SourceMatrix]:
    seen = set[str]()
    for source in (source for entry in entries for part in entry.parts for source in part):
        if source.paths[0] + source.suffix not in seen:  # kv_b_proj is the source of two entries
            seen.add(source.paths[0] + source.suffix)
            yield source


def _stored(path: str, source: SourceMatrix, form: PublishedFormat) -> Tensors:
    """Yield the tensors of one matrix."""
    shape = source.shape
    is_expert = ".mlp.experts." in path
    is_table = path in ("model.embed_tokens", "lm_head")
    if source.suffix != ".weight":
        yield path + source.suffix, "F32", shape
    elif source.is_float or (form == "int4" and not is_expert) or (form == "fp8" and is_table):
        yield f"{path}.weight", "BF16", shape
    elif form == "fp8":
        yield f"{path}.weight", "F8_E4M3", shape
        yield f"{path}.weight_scale_inv", "F32", (-(-shape[0] // FP8.block_rows), -(-shape[1] // FP8.block_columns))
    elif form == "int4":
        rows, columns = shape
        yield f"{path}.weight_packed", "I32", (rows, columns * INT4.bits // 32)
        yield f"{path}.weight_scale", "BF16", (rows, columns // INT4.group_size)
        yield f"{path}.weight_shape", "I32", (2,)
    else:
        rows, columns = shape
        yield f"{path}.weight", "U32", (rows, columns * MLX_4BIT.bits // 32)
        for name in ("scales", "biases"):
            yield f"{path}.{name}", "BF16", (rows, columns // MLX_4BIT.group_size)
