"""Make tests/parity/formats: tiny checkpoints in the published layouts, each with the logits of transformers.

Needs torch and compressed-tensors; transformers comes with mlx-lm. With the environment of `scripts/test`:

    .venv/bin/python -m pip install torch compressed-tensors==0.20.0
    .venv/bin/python scripts/make_formats.py

Weights are those of tests/checkpoints.py, rounded to bfloat16 and then compressed: FP8 here, INT4 by the package that
made the published checkpoints. The logits in `golden.npz` are those of transformers' DeepseekV3ForCausalLM in float32
with exactly the stored values. As in make_goldens.py, a seed whose routing has near ties is skipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from compressed_tensors.compressors import PackedQuantizationCompressor  # pyright: ignore[reportMissingImports]
from compressed_tensors.compressors.pack_quantized import unpack_from_int32  # pyright: ignore[reportMissingImports]
from compressed_tensors.quantization import QuantizationScheme  # pyright: ignore[reportMissingImports]
from compressed_tensors.quantization.utils import calculate_qparams  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.make_goldens import (  # noqa: E402
    K2,
    K25_TEXT,
    MAX_SEEDS,
    MIN_MARGIN,
    Reference,
    input_ids,
    routing_margin,
)
from tests.checkpoints import FORMATS, VISION, VISION_PREFIXES, Config, text_config, write_checkpoint  # noqa: E402

Tensors = dict[str, torch.Tensor]
Compressed = tuple[Tensors, torch.Tensor]
"""Stored tensors by the suffix of their names, and the float32 values that they represent."""

BLOCK = 128
GROUP = 32
MAX_E4M3 = 448.0

SMALL: Config = {
    **K2,
    "bos_token_id": 62,
    "eos_token_id": 63,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_attention_heads": 2,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 2,
    "qk_nope_head_dim": 32,
    "torch_dtype": "bfloat16",
    "v_head_dim": 32,
    "vocab_size": 64,
}

NARROW: Config = {**SMALL, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}

WIDE: Config = {
    **SMALL,
    "hidden_size": 192,
    "intermediate_size": 96,
    "kv_lora_rank": 256,  # kv_a_proj_with_mqa has 288 rows: 3 blocks, the last partial
    "moe_intermediate_size": 160,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}

FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
INT4_CONFIG = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {"actorder": None, "block_structure": None, "dynamic": False, **WEIGHTS},
        }
    },
    "format": "pack-quantized",
    "ignore": [
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        "re:.*lm_head.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
SCHEME = QuantizationScheme(targets=["Linear"], weights=WEIGHTS)


def uneven(weight: torch.Tensor) -> torch.Tensor:
    """Make a matrix larger towards its last row and first column, so that no two blocks have the same scale."""
    rows, columns = weight.shape
    slope = torch.logspace(-2, 1, rows, base=2).outer(torch.logspace(1, -2, columns, base=2))
    return (weight.float() * slope).to(weight.dtype)


def to_fp8(weight: torch.Tensor) -> Compressed:
    """Compress to 8-bit floats with one scale per block, as DeepSeek and Moonshot store them."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # (block rows, 128, block columns, 128)
    scale = blocks.abs().amax((1, 3)) / MAX_E4M3
    scales = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    codes = (weight.float() / scales).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale_inv": scale}, codes.float() * scales


def to_int4(weight: torch.Tensor) -> Compressed:
    """Compress to packed 4-bit integers with one bfloat16 scale per group."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), SCHEME.weights)
    stored = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, SCHEME)
    codes = unpack_from_int32(stored["weight_packed"], 4, weight.shape)
    value = codes.float() * scale.float().repeat_interleave(GROUP, 1)  # the package's own rounds to bfloat16
    return {f".{name}": tensor for name, tensor in stored.items()}, value


def to_int4_of_k25(weight: torch.Tensor) -> Compressed:
    """Compress as to_int4, with the shape in int32, as in K2.5's files."""
    stored, value = to_int4(weight)
    return {**stored, ".weight_shape": stored[".weight_shape"].int()}, value


@dataclass(frozen=True)
class Format:
    """A published layout.

    Args:
        config: complete contents of `config.json`.
        compress: function that compresses a matrix; None for floats.
        compresses: text in the names of the matrices that are compressed.
        ignored: name -> shape of further tensors, which the model does not use.
    """

    config: Config
    compress: Callable[[torch.Tensor], Compressed] | None = None
    compresses: str = ""
    ignored: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


FORMATS_BY_NAME = {
    "fp8": Format({**WIDE, "quantization_config": FP8_CONFIG}, to_fp8, "_proj"),
    "int4": Format({**SMALL, "quantization_config": INT4_CONFIG}, to_int4, ".mlp.experts."),
    "int4-k2.5": Format(
        {
            "architectures": ["KimiK25ForConditionalGeneration"],
            "bos_token_id": 62,
            "dtype": "bfloat16",
            "eos_token_id": 63,
            "media_placeholder_token_id": 61,
            "model_type": "kimi_k25",
            "text_config": {
                **SMALL,
                **{name: K25_TEXT[name] for name in ("max_position_embeddings", "rms_norm_eps", "rope_scaling")},
                "num_hidden_layers": 2,
                "quantization_config": INT4_CONFIG,
            },
            "tie_word_embeddings": False,
            "vision_config": {**VISION, "text_hidden_size": SMALL["hidden_size"]},
        },
        to_int4_of_k25,
        ".mlp.experts.",
    ),
    "bf16": Format(
        NARROW,
        ignored={
            "model.layers.0.self_attn.rotary_emb.inv_freq": (16,),
            "model.layers.3.embed_tokens.weight": (64, 64),
            "model.layers.3.enorm.weight": (64,),
            "model.layers.3.hnorm.weight": (64,),
            "model.layers.3.eh_proj.weight": (64, 128),
            "model.layers.3.shared_head.head.weight": (64, 64),
            "model.layers.3.input_layernorm.weight": (64,),
            "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": (64, 64),
        },
    ),
}


def make_tensors(layout: Format, seed: int) -> tuple[Tensors, Tensors]:
    """Return the tensors of a checkpoint, and the float32 values of the text model without prefix."""
    stored: Tensors = {}
    values: Tensors = {}
    prefix = "language_model." if "text_config" in layout.config else ""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), layout.config, seed, "bfloat16")
        tensors = {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}
    for full_name, tensor in sorted(tensors.items()):
        name = full_name.removeprefix(prefix)
        if name.startswith(VISION_PREFIXES):
            stored[name] = tensor
        elif layout.compress is not None and layout.compresses in name:
            parts, values[name] = layout.compress(uneven(tensor))
            path = prefix + name.removesuffix(".weight")
            stored |= {path + suffix: part for suffix, part in parts.items()}
        else:
            stored[prefix + name], values[name] = tensor, tensor.float()
    for name, shape in layout.ignored.items():
        stored[name] = torch.ones(shape, dtype=torch.float32 if name.endswith("inv_freq") else torch.bfloat16)
    return stored, values


def reference(config: Config, values: Tensors, ids: np.ndarray) -> Reference:
    """Run transformers in float32, as make_goldens.reference does, with these values."""
    removed = ("architectures", "model_type", "quantization_config", "torch_dtype")
    fields = {name: value for name, value in config.items() if name not in removed}
    described = DeepseekV3Config(**fields)
    with tempfile.TemporaryDirectory() as folder:
        described.save_pretrained(folder)  # transformers looks for it, although it is also given below
        save_file(values, Path(folder) / "model.safetensors", {"format": "pt"})
        model: Any = DeepseekV3ForCausalLM.from_pretrained(
            folder,
            config=described,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    with torch.no_grad():
        output = model.eval()(torch.tensor(ids, dtype=torch.long), output_router_logits=True, use_cache=False)
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    routers = [logits.reshape(ids.size, -1).numpy() for logits in output.router_logits]
    return output.logits.numpy(), routers, [gate.e_score_correction_bias.numpy() for gate in gates]


def write_format(folder: Path, config: Config, tensors: Tensors) -> int:
    """Write the configuration, the index and two weight files; return their size in bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = sorted(tensors)
    half = (len(names) + 1) // 2
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{number:05}-of-000002.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return sum(file.stat().st_size for file in folder.iterdir())


def make_format(name: str, layout: Format) -> None:
    """Write the checkpoint and the golden file of the first seed without near ties in the routing."""
    config = text_config(layout.config)
    for seed in range(MAX_SEEDS):
        ids = input_ids(config, seed)
        stored, values = make_tensors(layout, seed)
        logits, routers, biases = reference(config, values, ids)
        margin = min(routing_margin(config, *pair) for pair in zip(routers, biases, strict=True))
        if margin < MIN_MARGIN:
            continue
        size = write_format(FORMATS / name, layout.config, stored)
        np.savez_compressed(FORMATS / name / "golden.npz", input_ids=ids, logits=logits)
        print(f"{name}: seed {seed}, {size / 1000:.0f} kB, routing margin {margin:.1e}, logits std {logits.std():.2f}")
        return
    sys.exit(f"error: no seed below {MAX_SEEDS} gives `{name}` a routing without near ties")


def main() -> None:
    """Write the formats named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description="Make tests/parity/formats with torch and compressed-tensors.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FORMATS_BY_NAME)}; default: all")
    names: list[str] = parser.parse_args().names or list(FORMATS_BY_NAME)
    if unknown := set(names) - set(FORMATS_BY_NAME):
        parser.error(f"no such format: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for name in names:
        make_format(name, FORMATS_BY_NAME[name])


if __name__ == "__main__":
    main()
