"""Size of the KV cache."""

from __future__ import annotations

from kimi_mlx.model.config import DecoderConfig, ModelConfig

BFLOAT16_BYTES = 2


def kv_values_per_token(config: DecoderConfig) -> int:
    """Return the number of values per token and layer: the latent and the rotated key that all heads share."""
    return config.kv_lora_rank + config.qk_rope_head_dim


def kv_bytes_per_token(config: ModelConfig, num_layers: int | None = None, value_bytes: int = BFLOAT16_BYTES) -> int:
    """Return the bytes per token of a rank's KV cache. Latents have no heads, so no split of heads makes it smaller.

    Args:
        config: the model's dimensions.
        num_layers: number of layers on the rank; None for all of the model's.
        value_bytes: bytes per value.
    """
    layers = config.num_hidden_layers if num_layers is None else num_layers
    return layers * kv_values_per_token(config) * value_bytes
