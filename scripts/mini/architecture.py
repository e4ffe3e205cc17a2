"""Shape of kimi-mini: every architectural feature of Kimi K2, with a few million parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 384,
    "moe_intermediate_size": 96,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 64.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
    "use_cache": True,
    "num_nextn_predict_layers": 0,
}


@dataclass(frozen=True)
class Shape:
    """Dimensions that the training model needs, named as in `config.json`."""

    vocab_size: int
    hidden_size: int = CONFIG["hidden_size"]
    num_hidden_layers: int = CONFIG["num_hidden_layers"]
    first_k_dense_replace: int = CONFIG["first_k_dense_replace"]
    intermediate_size: int = CONFIG["intermediate_size"]
    moe_intermediate_size: int = CONFIG["moe_intermediate_size"]
    n_routed_experts: int = CONFIG["n_routed_experts"]
    num_experts_per_tok: int = CONFIG["num_experts_per_tok"]
    num_attention_heads: int = CONFIG["num_attention_heads"]
    q_lora_rank: int = CONFIG["q_lora_rank"]
    kv_lora_rank: int = CONFIG["kv_lora_rank"]
    qk_nope_head_dim: int = CONFIG["qk_nope_head_dim"]
    qk_rope_head_dim: int = CONFIG["qk_rope_head_dim"]
    v_head_dim: int = CONFIG["v_head_dim"]
    routed_scaling_factor: float = CONFIG["routed_scaling_factor"]
    rms_norm_eps: float = CONFIG["rms_norm_eps"]

    @property
    def attention_scale(self) -> float:
        """1 / sqrt(head width), times YaRN's (0.1 ln(factor) + 1)^2."""
        width = self.qk_nope_head_dim + self.qk_rope_head_dim
        yarn = 0.1 * CONFIG["rope_scaling"]["mscale_all_dim"] * math.log(CONFIG["rope_scaling"]["factor"]) + 1.0
        return width**-0.5 * yarn * yarn


def yarn_inverse_frequencies(dims: int) -> list[float]:
    """Return the `dims / 2` angular frequencies of YaRN: slow ones are divided by the factor."""
    scaling, base = CONFIG["rope_scaling"], CONFIG["rope_theta"]

    def pair_of(rotations: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_of(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair_of(scaling["beta_slow"])), dims - 1)
    frequencies: list[float] = []
    for pair in range(dims // 2):
        frequency = base ** (-2 * pair / dims)
        interpolated = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
        frequencies.append(frequency * (1 - interpolated) + frequency / scaling["factor"] * interpolated)
    return frequencies
