"""A checkpoint of K2's shape that loads and runs quickly, in kimi-mlx and in mlx-lm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kimi_mlx.bench.workloads import COMMON, write_synthetic

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "num_hidden_layers": 3,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}


def write_tiny(folder: Path, **changes: Any) -> Path:
    """Write the checkpoint; `changes` replace fields of its configuration."""
    write_synthetic(folder, {**COMMON, **TINY, **changes})
    return folder
