"""The formula of a draft model in plain numpy, float64, from the published names of its tensors; without a cache.

Source: EAGLE-3 (https://arxiv.org/abs/2503.01840); DeepSeek-V2 (https://arxiv.org/abs/2405.04434) for the attention;
YaRN (https://arxiv.org/abs/2309.00071) for the rotation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Divide x by its root mean square along the last axis, and scale it."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rope_frequencies(config: Mapping[str, Any]) -> np.ndarray:
    """Return radians per position of each pair: those with few rotations in the original context are slowed down."""
    size, theta, yarn = config["qk_rope_head_dim"], config["rope_theta"], config.get("rope_scaling")
    frequencies = theta ** (-np.arange(0, size, 2) / size)
    if not yarn:
        return frequencies

    def pair_with(rotations: float) -> float:
        return size / 2 * math.log(yarn["original_max_position_embeddings"] / (2 * math.pi * rotations), theta)

    low = max(math.floor(pair_with(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_with(yarn["beta_slow"])), size - 1)
    slowed = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequencies * (1 - slowed) + frequencies / yarn["factor"] * slowed


def rotate(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Rotate the pairs (x[2k], x[2k + 1]) of x (rows, ..., size) by position * frequency."""
    angles = positions[:, None] * frequencies
    angles = angles.reshape(len(positions), *[1] * (x.ndim - 2), -1)
    first, second = x[..., ::2], x[..., 1::2]
    turned = np.empty_like(x)
    turned[..., ::2] = first * np.cos(angles) - second * np.sin(angles)
    turned[..., 1::2] = first * np.sin(angles) + second * np.cos(angles)
    return turned


class ReferenceDraft:
    """A draft model.

    Args:
        config: its `config.json`; rope_scaling has equal `mscale` and `mscale_all_dim`.
        tensors: tensors by published name, with `midlayer.`.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Tensors):
        self.config = config
        self.tensors = {name: np.asarray(value, np.float64) for name, value in tensors.items()}

    def weight(self, name: str) -> np.ndarray:
        """Return a matrix or norm."""
        return self.tensors[name + ".weight"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """Apply a norm."""
        return rms_norm(x, self.weight(name), self.config["rms_norm_eps"])

    def fuse(self, captured: Sequence[np.ndarray]) -> np.ndarray:
        """Return the states (rows, D) for captured states of each layer, (rows, T)."""
        parts = list(captured)
        if self.config.get("fc_norm"):
            parts = [self.norm(part, f"fc_norm.{number}") for number, part in enumerate(parts)]
        return np.concatenate(parts, axis=-1) @ self.weight("fc").T

    def outputs(self, embeddings: np.ndarray, states: np.ndarray, positions: Sequence[int]) -> np.ndarray:
        """Return the outputs of all rows before the last norm, (rows, D), each attending to itself and those before."""
        normed = self.norm(states, "midlayer.hidden_norm")
        residual = normed if self.config.get("norm_before_residual") else states
        x = np.concatenate([self.norm(embeddings, "midlayer.input_layernorm"), normed], axis=-1)
        h = residual + self._attend(x, np.array(positions))
        z = self.norm(h, "midlayer.post_attention_layernorm")
        gate, up = z @ self.weight("midlayer.mlp.gate_proj").T, z @ self.weight("midlayer.mlp.up_proj").T
        return h + (gate / (1 + np.exp(-gate)) * up) @ self.weight("midlayer.mlp.down_proj").T

    def next_states(self, outputs: np.ndarray) -> np.ndarray:
        """Return the states of following rows."""
        return self.norm(outputs, "norm") if self.config.get("norm_output") else outputs

    def logits(self, outputs: np.ndarray) -> np.ndarray:
        """Return the logits of the drafted ids, (rows, V)."""
        return self.norm(outputs, "norm") @ self.weight("lm_head").T

    def _attend(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        config, path = self.config, "midlayer.self_attn."
        heads, nope, rope = (config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
        rank, rows = config["kv_lora_rank"], len(x)
        if config.get("q_lora_rank"):
            q = (
                self.norm(x @ self.weight(path + "q_a_proj").T, path + "q_a_layernorm")
                @ self.weight(path + "q_b_proj").T
            )
        else:
            q = x @ self.weight(path + "q_proj").T
        q = q.reshape(rows, heads, nope + rope)
        compressed = x @ self.weight(path + "kv_a_proj_with_mqa").T
        latent = self.norm(compressed[:, :rank], path + "kv_a_layernorm")
        kv = (latent @ self.weight(path + "kv_b_proj").T).reshape(rows, heads, -1)
        frequencies = rope_frequencies(config)
        q_rope, k_rope = (rotate(part, positions, frequencies) for part in (q[..., nope:], compressed[:, rank:]))
        scores = np.einsum("ihd,jhd->hij", q[..., :nope], kv[..., :nope]) + np.einsum("ihd,jd->hij", q_rope, k_rope)
        yarn = config.get("rope_scaling") or {"factor": 1, "mscale_all_dim": 0}
        temperature = 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1
        scores = scores * temperature**2 / math.sqrt(nope + rope)
        scores = np.where(np.tri(rows, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        values = np.einsum("hij,jhd->ihd", weights, kv[..., nope:])
        return values.reshape(rows, -1) @ self.weight(path + "o_proj").T
