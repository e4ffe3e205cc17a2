"""Load a draft model from its folder: published files, or MLX's quantization of them, in one file or several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.draft_config import LAYER, DraftConfig, canonical_name
from kimi_mlx.model.draft_model import DraftModel
from kimi_mlx.model.draft_names import EMBEDDING, IS_DRAFTED, TOKEN_OFFSETS, draft_entries
from kimi_mlx.model.names import IGNORED_SUFFIXES, TreeEntry
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Embedding, Weight
from kimi_mlx.weights.assemble import load_layer
from kimi_mlx.weights.checkpoint import CheckpointTensors
from kimi_mlx.weights.header import TensorInfo
from kimi_mlx.weights.index import read_index
from kimi_mlx.weights.layer_plan import plan_entries
from kimi_mlx.weights.plan import LayerPlan
from kimi_mlx.weights.reader import CheckpointReader
from kimi_mlx.weights.stored_matrices import MISMATCH_HINT


class DraftCheckpoint(CheckpointTensors):
    """The tensors of a draft model, by their canonical names.

    Args:
        config: configuration of the draft model.
        table: tensors of all files.
        location: folder or repository, for messages.

    Raises:
        WeightsError: two tensors have the same canonical name.
    """

    def __init__(self, config: DraftConfig, table: Mapping[str, TensorInfo], location: str):
        tensors: dict[str, TensorInfo] = {}
        for name, info in table.items():
            if (canonical := canonical_name(name)) in tensors:
                raise WeightsError(
                    f"`{location}` has tensor `{canonical}` twice, the second time as `{name}`", hint=MISMATCH_HINT
                )
            tensors[canonical] = info
        super().__init__(config, tensors, location)
        self.config = config

    def entries(self) -> list[TreeEntry]:
        """Return all entries of the draft model."""
        return draft_entries(self.config, self.layout)

    def is_ignored(self, name: str) -> bool:
        """Return whether the draft model does not use a tensor as a weight."""
        return name.endswith(IGNORED_SUFFIXES) or name in (TOKEN_OFFSETS, IS_DRAFTED)


def read_draft_checkpoint(folder: Path, config: DraftConfig) -> DraftCheckpoint:
    """Read the headers of the files of a draft model, and check them all.

    Raises:
        WeightsError: files are missing or broken, or a tensor is missing or unknown, or has a wrong type or shape.
    """
    checkpoint = DraftCheckpoint(config, read_index(folder), str(folder))
    checkpoint.check_names()
    plan_entries(checkpoint, checkpoint.entries(), None)
    _check_table(checkpoint, TOKEN_OFFSETS, ("I64", "I32"), config.draft_vocab_size)
    _check_table(checkpoint, IS_DRAFTED, ("BOOL", "U8"), config.vocab_size)
    if config.draft_vocab_size < config.vocab_size and TOKEN_OFFSETS not in checkpoint.tensors:
        raise WeightsError(
            f"`{folder}` lacks the tensor `{TOKEN_OFFSETS}`, which a vocabulary of {config.draft_vocab_size} out of "
            f"{config.vocab_size} tokens needs",
            hint="finish the download, or fetch `config.json` again",
        )
    return checkpoint


def load_draft(
    folder: Path,
    config: DraftConfig,
    dtype: mx.Dtype,
    captured_layers: tuple[int, ...],
    embedding: Embedding | None,
    quantization: Quantization | None = None,
) -> DraftModel:
    """Load a draft model.

    Args:
        folder: folder of the draft model.
        config: its configuration.
        dtype: compute dtype, that of the model.
        captured_layers: layers of the model whose inputs it reads.
        embedding: embedding of the model, used if the files have none.
        quantization: affine quantization of matrices that are stored as floats; None keeps them.

    Raises:
        WeightsError: as of read_draft_checkpoint, or the tables of a reduced vocabulary are wrong, or there is no
            embedding.
    """
    checkpoint = read_draft_checkpoint(folder, config)
    if not checkpoint.matrices.has(EMBEDDING):
        _check_embedding(folder, config, embedding)
    reader = CheckpointReader(checkpoint)
    token_ids = _read_token_ids(reader)
    plan = LayerPlan(
        plan_entries(checkpoint, checkpoint.entries(), None),
        latent_first=checkpoint.layout.has(f"{LAYER}self_attn.embed_q.weight"),
    )
    weights = load_layer(reader, plan, dtype)
    reader.close()
    if quantization is not None:
        entries = {
            name: parts if name == "embed_tokens" else [_quantize(part, quantization) for part in parts]
            for name, parts in weights.entries.items()
        }
        weights = LayerWeights(entries, weights.latent_first)
    return DraftModel(config, weights, captured_layers, embedding, token_ids)


def _quantize(part: Weight, quantization: Quantization) -> Weight:
    """Quantize a float matrix whose rows are whole groups; return others as they are."""
    bits, group_size = quantization.bits, quantization.group_size
    if part.quantization is not None or part.weight.ndim < 2 or part.weight.shape[-1] % group_size:
        return part
    arrays = mx.quantize(part.weight, group_size, bits)
    mx.eval(arrays)  # one matrix at a time
    return Weight(*arrays, quantization=quantization, dtype=part.dtype)


def _check_embedding(folder: Path, config: DraftConfig, embedding: Embedding | None) -> None:
    """Check that the embedding of the model can be used where the files have none."""
    if embedding is None:
        raise WeightsError(
            f"`{folder}` has no embedding, and neither has this rank of the model",
            hint="load the draft model on rank 0, which has the embedding of the model",
        )
    if embedding.columns != config.hidden_size:
        raise WeightsError(
            f"`{folder}` has no embedding of size {config.hidden_size}, and that of the model has {embedding.columns}",
            hint="finish the download, or fetch `config.json` again",
        )


def _read_token_ids(reader: CheckpointReader[DraftCheckpoint]) -> mx.array | None:
    """Return the tokens of the drafted ids, (draft_vocab_size,) int32; None if they are equal.

    Raises:
        WeightsError: the tokens are not distinct tokens of the vocabulary, or contradict `t2d`.
    """
    checkpoint = reader.checkpoint
    if TOKEN_OFFSETS not in checkpoint.tensors:
        return None
    size, count = checkpoint.config.vocab_size, checkpoint.config.draft_vocab_size
    tokens = reader.read(TOKEN_OFFSETS).astype(np.int64) + np.arange(count)
    error = None
    if tokens.min() < 0 or tokens.max() >= size:
        bad = tokens[(tokens < 0) | (tokens >= size)][0]
        error = f"maps an id to token {bad}, outside the vocabulary of {size}"
    elif len(np.unique(tokens)) < count:
        error = f"maps {count} ids to {len(np.unique(tokens))} tokens"
    elif IS_DRAFTED in checkpoint.tensors:
        is_drafted = reader.read(IS_DRAFTED).astype(bool)
        if is_drafted.sum() != count or not is_drafted[tokens].all():
            error = f"has {count} tokens, which are not the {is_drafted.sum()} of `{IS_DRAFTED}`"
    if error is not None:
        path = checkpoint.tensors[TOKEN_OFFSETS].file
        raise WeightsError(f"tensor `{TOKEN_OFFSETS}` in `{path}` {error}", hint="fetch the draft model again")
    return None if count == size and (tokens == np.arange(size)).all() else mx.array(tokens.astype(np.int32))


def _check_table(checkpoint: DraftCheckpoint, name: str, dtypes: tuple[str, ...], size: int) -> None:
    """Check type and shape of a table of a reduced vocabulary, if there is one."""
    info = checkpoint.tensors.get(name)
    if info is not None and (info.dtype not in dtypes or info.shape != (size,)):
        raise WeightsError(
            f"tensor `{name}` in `{info.file}` has type {info.dtype} and shape {info.shape}; `config.json` requires "
            f"{dtypes[0]} and ({size},)",
            hint=MISMATCH_HINT,
        )
