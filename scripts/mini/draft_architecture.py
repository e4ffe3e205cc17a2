"""Shape of kimi-mini's draft model: EAGLE-3.1 as published for Kimi K2.6, with half a million parameters."""

from __future__ import annotations

from typing import Any

from scripts.mini.architecture import CONFIG

SHARED = (
    "hidden_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "hidden_act",
    "attention_bias",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "tie_word_embeddings",
)
"""Fields with kimi-mini's values."""

LAYER_IDS = (0, 2, 3)
"""Layers of kimi-mini whose inputs the draft model reads."""

DRAFT_VOCAB_SIZE = 1024
"""Number of tokens that it can draft, of kimi-mini's 1,792."""

DRAFT_CONFIG: dict[str, Any] = {
    "architectures": ["Eagle3DeepseekV2ForCausalLM"],
    "model_type": "kimi_k2",
    "num_hidden_layers": 1,
    "intermediate_size": 384,
    "draft_vocab_size": DRAFT_VOCAB_SIZE,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(LAYER_IDS), "use_aux_hidden_state": True},
    "fc_norm": True,
    "norm_output": True,
    **{name: CONFIG[name] for name in SHARED},
}
