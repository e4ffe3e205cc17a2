"""Make tests/parity/vision_goldens: features and logits of transformers' KimiK25 model in float32 for tiny towers.

Needs torch; transformers is installed with mlx-lm. With the environment of `scripts/test`:

    .venv/bin/python -m pip install torch
    .venv/bin/python scripts/make_vision_goldens.py

Weights and pixels are made by tests/checkpoints.py from names and a seed. transformers reads the published tensors and
permutes the queries and keys itself. As in make_goldens.py, a seed whose routing has near ties is skipped.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.make_goldens import CONFIGS, MAX_SEEDS, MIN_MARGIN, routing_margin  # noqa: E402
from tests.checkpoints import (  # noqa: E402
    VISION,
    VISION_72,
    VISION_GOLDENS,
    Config,
    Grids,
    make_pixels,
    text_config,
    write_checkpoint,
)

COLUMNS = 8
"""Number of columns of the features in a golden file, evenly spaced."""

TWO_HEADS: Config = {
    **VISION_72,
    "init_pos_emb_height": 64,
    "init_pos_emb_width": 64,
    "mm_hidden_size": 144,
    "projector_ln_eps": 1e-3,
    "vt_hidden_size": 144,
    "vt_num_attention_heads": 2,
    "vt_num_hidden_layers": 3,
}
"""Heads of width 72 and a position table as large as K2.5's."""

ONE_HEAD: Config = {
    **TWO_HEADS,
    "mm_hidden_size": 72,
    "vt_hidden_size": 72,
    "vt_num_attention_heads": 1,
    "vt_num_hidden_layers": 1,
}
"""The same for large images, so that a test of them is quick."""

FEATURES: dict[str, tuple[Config, Grids]] = {
    "4x4": (TWO_HEADS, ((1, 4, 4),)),
    "12x10": (TWO_HEADS, ((1, 12, 10),)),
    "64x64": (ONE_HEAD, ((1, 64, 64),)),
    "70x30": (ONE_HEAD, ((1, 70, 30),)),
    "4-frames": (TWO_HEADS, ((4, 6, 8),)),
    "two-images": (TWO_HEADS, ((1, 12, 10), (1, 6, 16))),
    "narrow": (VISION, ((1, 8, 8), (3, 2, 12), (1, 2, 2))),
}
"""Towers and the grids of the images in one call."""

PROMPT: Grids = ((1, 4, 6), (4, 4, 4), (1, 8, 8))
"""Images of the prompt, with text before, between and behind them."""

TEXT_LENGTHS = (7, 5, 0, 11)
"""Numbers of text tokens before each image and behind the last one."""


def complete_config(vision: Config) -> Config:
    """Return K2.5's small configuration with another vision tower."""
    return {**CONFIGS["k2.5"], "vision_config": vision}


def load_reference(config: Config, seed: int) -> Any:
    """Load the checkpoint of a seed with transformers."""
    vision, text = config["vision_config"], text_config(config)
    described = Kimi_K25Config(
        text_config={**{k: v for k, v in text.items() if k != "architectures"}, "model_type": "deepseek_v3"},
        vision_config={
            "hidden_size": vision["vt_hidden_size"],
            "intermediate_size": vision["vt_intermediate_size"],
            "merge_kernel_size": vision["merge_kernel_size"],
            "num_attention_heads": vision["vt_num_attention_heads"],
            "num_hidden_layers": vision["vt_num_hidden_layers"],
            "patch_size": vision["patch_size"],
            "pos_emb_height": vision["init_pos_emb_height"],
            "pos_emb_time": vision["init_pos_emb_time"],
            "pos_emb_width": vision["init_pos_emb_width"],
        },
        image_token_id=config["media_placeholder_token_id"],
        projection_hidden_size=vision["vt_hidden_size"],
        projection_layer_norm_eps=vision["projector_ln_eps"],
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config, seed)
        model, report = Kimi_K25ForConditionalGeneration.from_pretrained(
            folder,
            config=described,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    if any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        sys.exit(f"error: transformers does not use the checkpoint as it is: {report}")
    return model.eval()


def as_inputs(seed: int, config: Config, grids: Grids) -> dict[str, torch.Tensor]:
    """Return the pixels, normalized to -1..1, and the grids."""
    pixels = torch.tensor(make_pixels(seed, grids, config["vision_config"]["patch_size"]))
    return {"pixel_values": (pixels.float() / 255 - 0.5) / 0.5, "image_grid_thw": torch.tensor(grids)}


def make_features(name: str, vision: Config, grids: Grids) -> None:
    """Write the features of images."""
    config, seed = complete_config(vision), 0
    model = load_reference(config, seed)
    with torch.no_grad():
        output = model.model.get_image_features(**as_inputs(seed, config, grids), return_dict=True)
    features = torch.cat(output.pooler_output).numpy()
    columns = np.arange(0, features.shape[1], features.shape[1] // COLUMNS)
    write(name, config, seed, grids, columns=columns, features=features[:, columns])
    print(f"{name}: {features.shape[0]} features of standard deviation {features.std():.2f}")


def make_prompt() -> None:
    """Write the logits of a prompt with images, with the first seed whose routing has no near ties."""
    config = complete_config(VISION_72)
    for seed in range(MAX_SEEDS):
        ids = prompt_ids(config, seed)
        model = load_reference(config, seed)
        routers: list[np.ndarray] = []
        gates = [layer.mlp.gate for layer in model.model.language_model.layers if hasattr(layer.mlp, "gate")]
        for gate in gates:
            gate.register_forward_hook(functools.partial(keep_router_logits, routers))
        with torch.no_grad():
            output = model(input_ids=torch.tensor(ids), **as_inputs(seed, config, PROMPT), use_cache=False)
        biases = [gate.e_score_correction_bias.numpy() for gate in gates]
        margin = min(routing_margin(text_config(config), *pair) for pair in zip(routers, biases, strict=True))
        if margin < MIN_MARGIN:
            continue
        logits = output.logits.numpy()
        write("prompt", config, seed, PROMPT, input_ids=ids, logits=logits)
        print(f"prompt: seed {seed}, {ids.size} tokens, routing margin {margin:.1e}, logits std {logits.std():.2f}")
        return
    sys.exit(f"error: no seed below {MAX_SEEDS} gives the prompt a routing without near ties")


def keep_router_logits(kept: list[np.ndarray], gate: Any, inputs: tuple[torch.Tensor], output: object) -> None:
    """Append a router's logits, (tokens, experts)."""
    hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
    kept.append((hidden.float() @ gate.weight.float().T).numpy())


def prompt_ids(config: Config, seed: int) -> np.ndarray:
    """Return (1, length) ids: text below the special tokens, and a placeholder per feature."""
    placeholder = config["media_placeholder_token_id"]
    words = iter(np.random.PCG64(seed).random_raw(sum(TEXT_LENGTHS)) % np.uint64(placeholder))
    ids: list[int] = []
    for length, (_, rows, columns) in zip(TEXT_LENGTHS, (*PROMPT, (1, 0, 0)), strict=True):
        ids += [int(next(words)) for _ in range(length)] + [placeholder] * (rows * columns // 4)
    return np.array([ids], np.int32)


def write(name: str, config: Config, seed: int, grids: Grids, **arrays: np.ndarray) -> None:
    """Write one golden file."""
    VISION_GOLDENS.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any] = {"config": json.dumps(config), "seed": seed, "grids": np.array(grids), **arrays}
    np.savez_compressed(VISION_GOLDENS / f"{name}.npz", **contents)


def main() -> None:
    """Write all golden files."""
    torch.set_num_threads(1)
    for name, (vision, grids) in FEATURES.items():
        make_features(name, vision, grids)
    make_prompt()


if __name__ == "__main__":
    main()
