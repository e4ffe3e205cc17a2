"""Memory of a draft model. Only the leader has one."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.draft_config import DraftConfig
from kimi_mlx.model.draft_names import EMBEDDING, draft_entries
from kimi_mlx.model.draft_quantization import EIGHT_BITS
from kimi_mlx.model.names import CheckpointLayout
from kimi_mlx.sizing.kv_cache import BFLOAT16_BYTES, kv_values_per_token
from kimi_mlx.sizing.prefill import PREFILL_CHUNK

CAPTURED_TOKENS = PREFILL_CHUNK
"""Largest number of tokens whose captured states exist at a time: a chunk of a prompt."""


@dataclass(frozen=True)
class DraftMemory:
    """Memory that a draft model takes on the leader, in addition to the model.

    Args:
        weights_bytes: size of its weights.
        token_bytes: size of its cache per token.
        captured_bytes: size of the captured states per token.
    """

    weights_bytes: int
    token_bytes: int
    captured_bytes: int

    def total_bytes(self, context: int) -> int:
        """Return the total with a cache of `context` tokens and their captured states, at most those of a chunk."""
        states = min(context, CAPTURED_TOKENS) * self.captured_bytes
        return self.weights_bytes + context * self.token_bytes + states


def draft_memory(config: DraftConfig, has_embedding: bool = False) -> DraftMemory:
    """Return the memory of a draft model.

    Args:
        config: dimensions of the draft model.
        has_embedding: whether its files have an embedding.
    """
    weights = draft_weight_bytes(config, has_embedding)
    return DraftMemory(weights, draft_cache_bytes_per_token(config), captured_bytes_per_token(config))


def draft_pass_bytes(config: DraftConfig) -> int:
    """Return the bytes of weights that each draft token reads: all but `fc`, which is read once per draft."""
    values = config.num_captured * config.target_hidden_size * config.hidden_size
    fc_bytes = _matrix_bytes(values, config.quantization_of("fc") or EIGHT_BITS, BFLOAT16_BYTES)
    return draft_weight_bytes(config) - fc_bytes


def draft_weight_bytes(
    config: DraftConfig,
    has_embedding: bool = False,
    value_bytes: int = BFLOAT16_BYTES,
    quantization: Quantization | None = EIGHT_BITS,
) -> int:
    """Return the bytes of a draft model's weights: for those of K2.5 to K2.7 3.7 GB as published, 2.0 GB on a GPU.

    Args:
        config: dimensions of the draft model; its quantization applies to all matrices.
        has_embedding: whether its files have an embedding; otherwise it uses that of the model.
        value_bytes: bytes per float.
        quantization: quantization of float matrices when they are loaded, by default that on a GPU; None keeps them,
            as on a CPU (kimi_mlx.model.draft_quantization.load_quantization).
    """
    layout = CheckpointLayout(lambda name: has_embedding and name == EMBEDDING, config.quantization_of)
    shapes = {
        path: source.shape
        for entry in draft_entries(config, layout)
        for part in entry.parts
        for source in part
        for path in source.paths
    }
    total = 0
    for path, shape in shapes.items():
        applied = config.quantization_of(path) or (None if path == "embed_tokens" else quantization)
        is_quantized = applied is not None and len(shape) > 1 and shape[-1] % applied.group_size == 0
        total += _matrix_bytes(prod(shape), applied if is_quantized else None, value_bytes)
    return total


def draft_cache_bytes_per_token(config: DraftConfig, value_bytes: int = BFLOAT16_BYTES) -> int:
    """Return the bytes per token of a draft model's cache: one layer."""
    return kv_values_per_token(config) * value_bytes


def captured_bytes_per_token(config: DraftConfig, value_bytes: int = BFLOAT16_BYTES) -> int:
    """Return the bytes per token of captured states, which are kept until the draft model has read them."""
    return config.num_captured * config.target_hidden_size * value_bytes


def _matrix_bytes(values: int, quantization: Quantization | None, value_bytes: int) -> int:
    if quantization is None:
        return values * value_bytes
    per_group = 2 * value_bytes if quantization.mode == "affine" else 1  # a scale and a bias, or a scale of 8 bits
    return values * quantization.bits // 8 + values // quantization.group_size * per_group
