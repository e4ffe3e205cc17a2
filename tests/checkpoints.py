"""Small checkpoints with reproducible weights, in the layouts that real repositories use.

`write_checkpoint` writes a Hugging Face folder from a config alone; `quantize_checkpoint` converts such a folder
to the MLX affine layouts. A weight depends only on the seed, its name and its shape, so golden files contain
no weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kimi_mlx.store.locate import ensure_downloaded

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
Grids = tuple[tuple[int, int, int], ...]
"""Frames, rows and columns of patches of each image."""

GOLDENS = Path(__file__).parent / "parity" / "goldens"
VISION_GOLDENS = Path(__file__).parent / "parity" / "vision_goldens"
FORMATS = Path(__file__).parent / "parity" / "formats"
BIAS = "mlp.gate.e_score_correction_bias"
BIAS_SUFFIX = ".bias"
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
LINEAR_GAIN = 1.0  # standard deviation of a matrix times sqrt(inputs): keeps activations of order 1
ROUTER_GAIN = 1.5  # spreads the sigmoid scores
HEAD_GAIN = 3.0  # logits of order 1 to 10
BIAS_RANGE = 0.2  # of the router: large enough to change the choice of experts; of the vision tower
PATCH_GAIN = 0.05  # of patches and positions: the epsilon of the first norm matters then
NORM_RANGE = 0.3

VISION: Config = {
    "init_pos_emb_height": 8,
    "init_pos_emb_time": 4,
    "init_pos_emb_width": 8,
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "mm_hidden_size": 64,
    "mm_projector_type": "patchmerger",
    "patch_size": 14,
    "pos_emb_type": "divided_fixed",
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-5,
    "text_hidden_size": 128,
    "video_attn_type": "spatial_temporal",
    "vt_hidden_size": 64,
    "vt_intermediate_size": 80,  # like K2.5's 4304 not a multiple of 32, so that mlp.fc1 cannot be quantized
    "vt_num_attention_heads": 4,
    "vt_num_hidden_layers": 2,
}
"""The `vision_config` of a tiny tower for a text model with hidden size 128."""

VISION_72: Config = {**VISION, "mm_hidden_size": 288, "vt_hidden_size": 288, "vt_num_attention_heads": 4}
"""The same with heads of K2.5's width, 72; its matrices can be quantized in groups of 32."""

VISION_PREFIXES = ("vision_tower.", "mm_projector.")


@dataclass(frozen=True)
class Golden:
    """Results of transformers in float32 for the checkpoint `write_checkpoint(folder, config, seed)`.

    Attributes:
        input_ids: tokens, (batch, length), int32.
        logits: logits of all positions, (batch, length, vocab_size), float32.
    """

    name: str
    config: Config
    seed: int
    input_ids: np.ndarray
    logits: np.ndarray


def golden_names() -> list[str]:
    """Return the names of the committed golden files."""
    return sorted(path.stem for path in GOLDENS.glob("*.npz"))


def load_golden(name: str) -> Golden:
    """Read one golden file."""
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        config = json.loads(str(file["config"]))
        return Golden(name, config, int(file["seed"]), file["input_ids"], file["logits"])


def text_config(config: Config) -> Config:
    """Return the part of a config that describes the language model (K2.5 nests it)."""
    return config.get("text_config", config)


def write_checkpoint(folder: Path, config: Config, seed: int, dtype: str = "float32") -> Path:
    """Write a checkpoint as published on the hub: config, index, two shards, one tensor per matrix of each expert.

    Args:
        folder: target; created if missing.
        config: fields of `config.json`; with `text_config`, names get K2.5's prefix, and with `vision_config`
            there is a vision tower.
        seed: random seed of the weights.
        dtype: dtype of all tensors except the router's correction bias, which is float32 as in real checkpoints.

    Returns:
        The folder.
    """
    prefix = "language_model." if "text_config" in config else ""
    tensors = {
        prefix + name: store(name, tensor_values(name, shape, seed), dtype)
        for name, shape in tensor_shapes(text_config(config)).items()
    }
    if "vision_config" in config:
        shapes = vision_shapes(config["vision_config"])
        tensors |= {name: store(name, tensor_values(name, shape, seed), dtype) for name, shape in shapes.items()}
    write_shards(folder, {**config, "torch_dtype": dtype}, tensors, num_shards=2)
    return folder


def write_endless_checkpoint(folder: Path) -> Path:
    """Write a checkpoint with random weights and kimi-mini's text: greedy, it never ends an answer or calls a tool.

    Control tokens have a logit of 0, which is never the largest one.
    """
    mini = ensure_downloaded("kimi-mini")
    config = json.loads((mini / "config.json").read_text())
    kept = {name: value for name, value in config.items() if not name.startswith("quantization")}
    tensors = {name: tensor_values(name, shape, seed=1) for name, shape in tensor_shapes(kept).items()}
    tensors["lm_head.weight"][kept["bos_token_id"] :] = 0
    stored = {name: store(name, value, "float32") for name, value in tensors.items()}
    write_shards(folder, {**kept, "torch_dtype": "float32"}, stored, num_shards=2)
    for name in ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(mini / name, folder)
    generation = json.loads((mini / "generation_config.json").read_text())
    del generation["kimi_mlx_max_tokens"]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def tensor_shapes(config: Config) -> Shapes:
    """Return the shape of each tensor by name, in the published layout."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        is_dense = layer < config["first_k_dense_replace"]
        block = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            **attention_shapes(config),
            **(mlp_shapes("mlp", hidden, config["intermediate_size"]) if is_dense else _moe_shapes(config)),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def vision_shapes(config: Config) -> Shapes:
    """Return the shape of each tensor of the vision tower and its projector by name, in the published layout.

    Args:
        config: the `vision_config`.
    """
    hidden, inner, size = config["vt_hidden_size"], config["vt_intermediate_size"], config["patch_size"]
    merged = math.prod(config["merge_kernel_size"]) * hidden
    shapes: Shapes = {
        "vision_tower.patch_embed.pos_emb.weight": (
            config["init_pos_emb_height"],
            config["init_pos_emb_width"],
            hidden,
        ),
        **_with_bias("vision_tower.patch_embed.proj", (hidden, 3, size, size)),
        **_with_bias("vision_tower.encoder.final_layernorm", (hidden,)),
        **_with_bias("mm_projector.pre_norm", (hidden,)),
        **_with_bias("mm_projector.proj.0", (merged, merged)),
        **_with_bias("mm_projector.proj.2", (config["text_hidden_size"], merged)),
    }
    for block in range(config["vt_num_hidden_layers"]):
        path = f"vision_tower.encoder.blocks.{block}"
        shapes |= {
            **_with_bias(f"{path}.norm0", (hidden,)),
            **_with_bias(f"{path}.norm1", (hidden,)),
            **_with_bias(f"{path}.wqkv", (3 * hidden, hidden)),
            **_with_bias(f"{path}.wo", (hidden, hidden)),
            **_with_bias(f"{path}.mlp.fc0", (inner, hidden)),
            **_with_bias(f"{path}.mlp.fc1", (hidden, inner)),
        }
    return shapes


def _with_bias(path: str, shape: tuple[int, ...]) -> Shapes:
    return {f"{path}.weight": shape, f"{path}.bias": shape[:1]}


def quantize_checkpoint(
    src: Path,
    dst: Path,
    bits: int,
    group_size: int,
    overrides: dict[str, dict[str, int] | bool] | None = None,
    split_kv_b: bool = True,
    stack_experts: bool = True,
    dtype: str = "float32",
) -> Path:
    """Write the MLX affine form of a checkpoint made by `write_checkpoint`.

    Args:
        src: checkpoint written by `write_checkpoint`.
        dst: target.
        bits: bits of all matrices except the router's.
        group_size: size of a quantization group.
        overrides: module path -> its own `{"bits", "group_size"}`, or False to leave it unquantized;
            written into the `quantization` block. Paths are those of stacked experts and, if split, of the halves.
        split_kv_b: whether to write the absorbed form, `embed_q` (heads, kv_lora_rank, nope) and `unembed_out`
            (heads, v, kv_lora_rank); if not, `kv_b_proj` is quantized as a whole.
        stack_experts: whether to write stacked experts, `mlp.switch_mlp`; if not, one tensor per expert.
        dtype: dtype of norms, scales and biases; the correction bias stays float32.

    Returns:
        The folder `dst`.
    """
    config = json.loads((src / "config.json").read_text())
    tensors = dict(_read_language_tensors(src))
    if split_kv_b:
        tensors = _split_kv_b(tensors, text_config(config))
    if stack_experts:
        tensors = _stack_experts(tensors, text_config(config)["n_routed_experts"])
    overrides = overrides or {}
    stored: dict[str, mx.array] = {}
    for name, value in tensors.items():
        path = name.removesuffix(".weight")
        choice = overrides.get(_stacked_path(path), {"bits": bits, "group_size": group_size})
        value = value if name.endswith(BIAS) else value.astype(DTYPES[dtype])
        if value.ndim < 2 or path.endswith("mlp.gate") or choice is False:
            stored[name] = value
        else:
            assert isinstance(choice, dict)
            parts = mx.quantize(value, group_size=choice["group_size"], bits=choice["bits"])
            names = (f"{path}.{part}" for part in ("weight", "scales", "biases"))
            stored |= dict(zip(names, parts, strict=True))
    block = {"group_size": group_size, "bits": bits, "mode": "affine", **overrides}
    config |= {"quantization": block, "quantization_config": block, "torch_dtype": dtype}
    write_shards(dst, config, stored, num_shards=2)
    return dst


def dequantize_checkpoint(src: Path, dst: Path) -> Path:
    """Write the float32 checkpoint with exactly the values of a quantized one; return `dst`."""
    config = json.loads((src / "config.json").read_text())
    block = config.pop("quantization")
    del config["quantization_config"]
    tensors = dict(_read_language_tensors(src))
    floats: dict[str, mx.array] = {}
    for name, value in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        if f"{path}.scales" in tensors:
            choice = {**block, **block.get(_stacked_path(path), {})}
            scales, biases = (tensors[f"{path}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            value = mx.dequantize(value, scales, biases, group_size=choice["group_size"], bits=choice["bits"])
        floats[name] = value.astype(mx.float32)
    write_shards(dst, {**config, "torch_dtype": "float32"}, floats, num_shards=2)
    return dst


def attention_shapes(config: Config, input_size: int | None = None) -> Shapes:
    """Return the shape of each tensor of an attention by name; `input_size` is hidden_size if None."""
    hidden, heads, q_rank = config["hidden_size"], config["num_attention_heads"], config.get("q_lora_rank")
    inputs = input_size or hidden
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    kv_rank, q_out = config["kv_lora_rank"], heads * (nope + rope)
    query: Shapes = {"q_proj.weight": (q_out, inputs)}
    if q_rank is not None:
        query = {
            "q_a_proj.weight": (q_rank, inputs),
            "q_a_layernorm.weight": (q_rank,),
            "q_b_proj.weight": (q_out, q_rank),
        }
    shapes: Shapes = {
        **query,
        "kv_a_proj_with_mqa.weight": (kv_rank + rope, inputs),
        "kv_a_layernorm.weight": (kv_rank,),
        "kv_b_proj.weight": (heads * (nope + value), kv_rank),
        "o_proj.weight": (hidden, heads * value),
    }
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def mlp_shapes(path: str, hidden: int, intermediate: int) -> Shapes:
    """Return the shape of each tensor of a dense MLP by name."""
    return {
        f"{path}.gate_proj.weight": (intermediate, hidden),
        f"{path}.up_proj.weight": (intermediate, hidden),
        f"{path}.down_proj.weight": (hidden, intermediate),
    }


def _moe_shapes(config: Config) -> Shapes:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    experts = config["n_routed_experts"]
    shapes: Shapes = {"mlp.gate.weight": (experts, hidden), BIAS: (experts,)}
    for expert in range(experts):
        shapes |= mlp_shapes(f"mlp.experts.{expert}", hidden, width)
    if config["n_shared_experts"]:
        shapes |= mlp_shapes("mlp.shared_experts", hidden, width * config["n_shared_experts"])
    return shapes


def make_pixels(seed: int, grids: Grids, patch_size: int) -> np.ndarray:
    """Return reproducible patches of images, (patches, 3, patch_size, patch_size) uint8."""
    patches = sum(map(math.prod, grids))
    words = np.random.PCG64(seed).random_raw(patches * 3 * patch_size**2)
    return (words >> 56).astype(np.uint8).reshape(patches, 3, patch_size, patch_size)


def tensor_values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return reproducible float32 values.

    They are computed from raw 64-bit words by exact arithmetic: numpy keeps these words the same in all versions,
    but not the values of its distributions.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    words = np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(int(np.prod(shape)))
    uniform = ((words >> 40).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)).reshape(shape)
    if name.endswith((BIAS, BIAS_SUFFIX)):
        return uniform * np.float32(BIAS_RANGE)
    if len(shape) == 1:
        return np.float32(1.0) + uniform * np.float32(NORM_RANGE)
    gain = HEAD_GAIN if name == "lm_head.weight" else LINEAR_GAIN
    gain = ROUTER_GAIN if name.endswith("mlp.gate.weight") else gain
    gain = PATCH_GAIN if "patch_embed" in name else gain
    is_table = name.endswith(("embed_tokens.weight", "pos_emb.weight"))
    inputs = 1 if is_table else math.prod(shape[1:])
    return uniform * np.float32(gain * (3.0 / inputs) ** 0.5)


def store(name: str, values: np.ndarray, dtype: str) -> mx.array:
    """Return values in the dtype of their tensor."""
    return mx.array(values).astype(mx.float32 if name.endswith(BIAS) else DTYPES[dtype])


def write_shards(folder: Path, config: Config, tensors: dict[str, mx.array], num_shards: int) -> None:
    """Write config and shards with about the same number of tensors, in the order of names.

    With one shard there is one file `model.safetensors`, and no index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if num_shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
        return
    names = sorted(tensors)
    size = -(-len(names) // num_shards)
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        part, file = names[number * size : (number + 1) * size], f"model-{number + 1:05}-of-{num_shards:06}.safetensors"
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _read_language_tensors(folder: Path) -> Iterator[tuple[str, mx.array]]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        tensors = mx.load(str(folder / file))
        assert isinstance(tensors, dict)
        yield from ((name, value) for name, value in tensors.items() if not name.startswith(VISION_PREFIXES))


def _split_kv_b(tensors: dict[str, mx.array], config: Config) -> dict[str, mx.array]:
    heads, nope, value = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    result: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        if not name.endswith("self_attn.kv_b_proj.weight"):
            result[name] = tensor
            continue
        path = name.removesuffix("kv_b_proj.weight")
        by_head = tensor.reshape(heads, nope + value, -1)  # (heads, nope + v, kv_lora_rank)
        result[f"{path}embed_q.weight"] = mx.contiguous(by_head[:, :nope].swapaxes(1, 2))
        result[f"{path}unembed_out.weight"] = mx.contiguous(by_head[:, nope:])
    return result


def _stack_experts(tensors: dict[str, mx.array], experts: int) -> dict[str, mx.array]:
    result = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for name in tensors:
        if ".mlp.experts.0." in name:
            before, after = name.split(".mlp.experts.0.")
            parts = [tensors[f"{before}.mlp.experts.{expert}.{after}"] for expert in range(experts)]
            result[f"{before}.mlp.switch_mlp.{after}"] = mx.stack(parts)
    return result


def _stacked_path(path: str) -> str:
    """Return the module path of an expert's matrix in a `quantization` block."""
    before, separator, after = path.partition(".mlp.experts.")
    return f"{before}.mlp.switch_mlp.{after.split('.', 1)[1]}" if separator else path
