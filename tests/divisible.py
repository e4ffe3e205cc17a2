"""Small checkpoints that can be split over up to 8 ranks with every strategy, also unevenly."""

from __future__ import annotations

import random
from pathlib import Path

from tests.checkpoints import Config, load_golden, quantize_checkpoint, write_checkpoint

GROUP_SIZE = 32
K2: Config = {
    **load_golden("k2").config,
    "vocab_size": 301,
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
"""Configuration; two heads make up one quantization group of the output projection."""

CONFIGS: dict[str, Config] = {
    "k2": K2,
    # without q_lora; two shared experts, fused with the routed ones
    "moonlight": {**K2, "q_lora_rank": None, "n_shared_experts": 2},
    # shared experts with another quantization than the routed ones; experts in groups
    "unfused": {**K2, "n_shared_experts": 2, "n_group": 4, "topk_group": 2},
}


def write_divisible(folder: Path, name: str, layers: int) -> Path:
    """Write one of CONFIGS with `layers` layers in 4 bits; return the checkpoint."""
    config = {**CONFIGS[name], "num_hidden_layers": layers}
    source = write_checkpoint(folder / f"{name}-float", config, seed=7)
    overrides: dict[str, dict[str, int] | bool] = {}
    if name == "unfused":
        paths = (f"model.layers.{layer}.mlp.shared_experts" for layer in range(1, layers))
        overrides = {
            f"{path}.{kind}": {"bits": 8, "group_size": 64} for path in paths for kind in ("gate_proj", "down_proj")
        }
    return quantize_checkpoint(source, folder / name, bits=4, group_size=GROUP_SIZE, overrides=overrides)


def make_prompt(length: int, seed: int) -> tuple[int, ...]:
    """Return random token ids, which depend only on the arguments."""
    choose = random.Random(seed)
    return tuple(choose.randrange(K2["vocab_size"]) for _ in range(length))
