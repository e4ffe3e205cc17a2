"""Make tests/parity/goldens: float32 logits of transformers' DeepseekV3ForCausalLM for tiny configurations.

This is the only file that needs torch; transformers is installed with mlx-lm. With the environment of `scripts/test`:

    .venv/bin/python -m pip install torch
    .venv/bin/python scripts/make_goldens.py

Weights are made by tests/checkpoints.py from names and a seed, so a golden file holds config, seed, input
ids and logits. A seed is refused when its routing is degenerate (an expert that is never chosen, a correction
bias that changes nothing) or so close to a tie that float32 rounding could change an expert.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.checkpoints import GOLDENS, VISION, Config, text_config, write_checkpoint  # noqa: E402

LENGTH = 96  # three times the original context of the YaRN configurations
MIN_MARGIN = (
    5e-5  # minimum difference between the last chosen expert (or group) and the next; float32 noise is about 1e-6
)
MAX_SEEDS = 200


def yarn(factor: float, beta_fast: float, mscale_all_dim: float = 1.0) -> dict[str, Any]:
    """Return the rope_scaling of a K2-like model whose original context is only 32 tokens."""
    return {
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "factor": factor,
        "mscale": 1.0,
        "mscale_all_dim": mscale_all_dim,
        "original_max_position_embeddings": 32,
        "type": "yarn",
    }


K2: Config = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 188,
    "eos_token_id": 189,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 384,
    "kv_lora_rank": 64,
    "max_position_embeddings": 1024,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 192,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_scaling": yarn(factor=32.0, beta_fast=1.0),
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 64,
    "vocab_size": 192,
}

GROUPED: Config = {
    **K2,
    "model_type": "deepseek_v3",
    "n_group": 4,
    "rope_scaling": yarn(factor=32.0, beta_fast=32.0, mscale_all_dim=0.5),  # cos and sin are scaled too
    "topk_group": 2,
}

K25_TEXT: Config = {
    **K2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_scaling": yarn(factor=64.0, beta_fast=32.0),
}

CONFIGS: dict[str, Config] = {
    "k2": K2,
    # two dense layers, more and wider heads, rope as wide as the rest of the head
    "k2-thinking": {
        **K2,
        "first_k_dense_replace": 2,
        "kv_lora_rank": 96,
        "max_position_embeddings": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 8,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_scaling": yarn(factor=64.0, beta_fast=1.0),
        "v_head_dim": 32,
    },
    "k2.5": {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "bos_token_id": 188,
        "eos_token_id": 190,
        "media_placeholder_token_id": 187,
        "model_type": "kimi_k25",
        "text_config": K25_TEXT,
        "tie_word_embeddings": False,
        "vision_config": VISION,
    },
    "moonlight": {
        **K2,
        "max_position_embeddings": 8192,
        "model_type": "deepseek_v3",
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "routed_scaling_factor": 2.446,
    },
    "grouped": GROUPED,
    # 7 of the 8 experts that two groups have: some are chosen with a negative score, so that an expert of a
    # dropped group must count as minus infinity and not as 0
    "grouped-negative": {**GROUPED, "num_experts_per_tok": 7},
}


def input_ids(config: Config, seed: int) -> np.ndarray:
    """Return (1, LENGTH) ids, with all ids of the vocabulary about equally frequent."""
    words = np.random.PCG64(seed).random_raw(LENGTH)
    return (words % np.uint64(text_config(config)["vocab_size"])).astype(np.int32)[None]


Reference = tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]


def reference(config: Config, seed: int, ids: np.ndarray) -> Reference:
    """Run transformers on the checkpoint of a seed.

    Returns:
        Logits (1, length, vocab), and per MoE layer router logits (length, experts) and bias (experts,).
    """
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), text_config(config), seed)  # the tensors of K2.5's format, except for the prefix
        fields = {k: v for k, v in text_config(config).items() if k not in ("model_type", "architectures")}
        model: Any = DeepseekV3ForCausalLM.from_pretrained(
            folder,
            config=DeepseekV3Config(**fields),
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    with torch.no_grad():
        output = model.eval()(torch.tensor(ids, dtype=torch.long), output_router_logits=True, use_cache=False)
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    routers = [r.reshape(ids.size, -1) for r in output.router_logits]
    return (
        output.logits.numpy(),
        [r.numpy() for r in routers],
        [g.e_score_correction_bias.numpy() for g in gates],
    )


def choose_experts(config: Config, scores: np.ndarray) -> tuple[np.ndarray, float]:
    """Choose experts by group, as the model does.

    Args:
        scores: router scores (length, experts).

    Returns:
        Mask of the chosen experts, (length, experts), and the smallest difference from a tie.
    """
    groups, top_k = config["n_group"], config["num_experts_per_tok"]
    dropped = groups - config["topk_group"]
    in_group = config["n_routed_experts"] // groups
    by_group = np.sort(scores.reshape(-1, groups, in_group), axis=-1)[..., -2:].sum(-1)  # (length, groups)
    ordered = np.sort(by_group, axis=-1)
    is_kept = np.repeat(by_group >= ordered[:, dropped, None], in_group, axis=-1)  # (length, experts)
    kept = np.where(is_kept, scores, -np.inf)
    best = np.sort(kept, axis=-1)
    margins = [best[:, -top_k] - best[:, -top_k - 1]]
    if dropped:
        margins.append(ordered[:, dropped] - ordered[:, dropped - 1])
    return kept >= best[:, -top_k, None], float(min(margin.min() for margin in margins))


def routing_margin(config: Config, router_logits: np.ndarray, bias: np.ndarray) -> float:
    """Return the smallest difference of a layer's choices from a tie, or 0 if the routing is degenerate."""
    scores = 1.0 / (1.0 + np.exp(-router_logits.astype(np.float64)))
    chosen, margin = choose_experts(config, scores + bias)
    without_bias, _ = choose_experts(config, scores)
    is_used = chosen.any(axis=0)
    is_moved = (chosen != without_bias).any(axis=-1)
    return margin if is_used.all() and is_moved.mean() > 0.1 else 0.0


def make_golden(name: str, config: Config) -> None:
    """Find the first seed without near-ties in the routing, and write its golden file."""
    for seed in range(MAX_SEEDS):
        ids = input_ids(config, seed)
        logits, routers, biases = reference(config, seed, ids)
        pairs = zip(routers, biases, strict=True)
        margin = min(routing_margin(text_config(config), router, bias) for router, bias in pairs)
        if margin < MIN_MARGIN:
            continue
        arrays = {"config": json.dumps(config), "seed": seed, "input_ids": ids, "logits": logits}
        np.savez(GOLDENS / f"{name}.npz", **arrays)
        print(f"{name}: seed {seed}, routing margin {margin:.1e}, logits std {logits.std():.2f}")
        return
    sys.exit(f"error: no seed below {MAX_SEEDS} gives `{name}` a clear routing")


def main() -> None:
    """Write the named golden files, or all."""
    parser = argparse.ArgumentParser(description="Make tests/parity/goldens with transformers and torch.")
    parser.add_argument("names", nargs="*", help=f"names out of {', '.join(CONFIGS)}; default: all")
    names: list[str] = parser.parse_args().names or list(CONFIGS)
    if unknown := set(names) - set(CONFIGS):
        parser.error(f"no such configuration: {', '.join(sorted(unknown))}")
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for name in names:
        make_golden(name, CONFIGS[name])


if __name__ == "__main__":
    main()
