"""`config.json` of the Kimi K2 family: the dataclass, and loading it.

Field names are those of the published files. Supported model types are `kimi_k2` (K2, K2-Thinking), `kimi_k25` (K2.5
and later, whose text model is in `text_config`) and `deepseek_v3` (Moonlight).
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_mlx.errors import ConfigError
from kimi_mlx.files import read_regular_file
from kimi_mlx.model.config_quantization import Fp8Blocks, PackedInts, Quantization, parse_quantization
from kimi_mlx.model.config_rope import YarnScaling, parse_rope, yarn_mscale
from kimi_mlx.model.config_values import INVALID_HINT, check_fields, first_given, get_object
from kimi_mlx.model.vision_config import VisionConfig, parse_vision
from kimi_mlx.model_files import fetch_again_hint

MODEL_TYPES = ("kimi_k2", "deepseek_v3")
"""Supported values of `model_type` of the text model."""

NORM_EPS_LATENT = 1e-6
"""Epsilon of q_a_layernorm and kv_a_layernorm, whatever `rms_norm_eps` is (DeepSeek-V3's published code)."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Dimensions and constants that the layers of a model and of a draft model have in common; sizes in elements.

    `quantization` is MLX's layout, `compression` the format of published weights. Each applies to the matrices whose
    tensors have its form; a file may have both.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    q_lora_rank: int | None = None
    yarn: YarnScaling | None = None
    dtype: str = "bfloat16"
    quantization: Quantization | None = None
    quantization_overrides: Mapping[str, Quantization] = field(default_factory=dict)
    compression: Fp8Blocks | PackedInts | None = None

    @property
    def latent_norm_eps(self) -> float:
        """Epsilon of q_a_layernorm and kv_a_layernorm."""
        return NORM_EPS_LATENT

    @property
    def qk_head_dim(self) -> int:
        """Size of a query head: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        """Factor on the attention scores, YaRN's temperature included (DeepSeek-V3's published code)."""
        scale = self.qk_head_dim**-0.5
        if self.yarn is not None and self.yarn.mscale_all_dim:
            scale *= yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2
        return scale

    def quantization_of(self, path: str) -> Quantization | None:
        """Return the quantization of the weight at `path`, such as `model.layers.3.mlp.switch_mlp.up_proj`."""
        return self.quantization_overrides.get(path, self.quantization)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(DecoderConfig):
    """Dimensions and constants of the text model, and of the vision tower if there is one; sizes in elements."""

    model_type: str
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    vision: VisionConfig | None = None

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether `layer` has experts instead of one dense MLP."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


def load_config(folder: Path) -> ModelConfig:
    """Read and check `config.json` in a checkpoint's folder.

    Raises:
        ConfigError: the file is missing or is not JSON, or the model is not supported.
    """
    return parse_config(read_json(folder / "config.json"), where=str(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`; raise ConfigError if it is missing or invalid."""
    try:
        value = json.loads(read_regular_file(path).decode())
    except FileNotFoundError:
        raise ConfigError(
            f"`{path}` does not exist", hint="give the folder of a checkpoint: it contains `config.json`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"`{path}` cannot be read: {reason}", hint=unreadable_hint(path, error)) from None
    if not isinstance(value, dict):
        raise ConfigError(f"`{path}` holds {type(value).__name__}, not an object", hint=fetch_again_hint(path))
    return value


def unreadable_hint(path: Path, error: Exception) -> str:
    """Return the hint for a file that cannot be read."""
    return "check its permissions" if isinstance(error, PermissionError) else fetch_again_hint(path)


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Turn the contents of `config.json` into a ModelConfig.

    Args:
        raw: the parsed file; `text_config`, if present, is used instead of the top level.
        where: name of the file, for messages.

    Raises:
        ConfigError: an unsupported architecture, a missing field or an invalid value.
    """
    outer = raw
    raw = get_object(outer, "text_config", where) or outer
    if is_draft_config(outer):
        raise ConfigError(
            f"`{where}` is that of a draft model, which proposes tokens for another model",
            hint="name it with `--draft`, and the model for which it drafts as MODEL",
        )
    _reject_unsupported(outer, raw, where)
    theta, yarn = parse_rope(raw, where)
    dtype = first_given(raw.get("torch_dtype"), raw.get("dtype"), outer.get("dtype"))
    quantization, overrides, compression = parse_quantization(outer, raw, where)
    plain = check_fields(ModelConfig, {**raw, "rope_theta": theta, "dtype": dtype}, where)
    config = ModelConfig(
        **plain,
        yarn=yarn,
        quantization=quantization,
        quantization_overrides=overrides,
        compression=compression,
        vision=parse_vision(outer, plain["hidden_size"], where),
    )
    _reject_contradictions(config, where)
    return config


def is_draft_config(raw: Mapping[str, Any]) -> bool:
    """Return whether a parsed `config.json` is that of a draft model, supported or not."""
    return any("eagle" in name.lower() for name in architectures(raw))


def architectures(raw: Mapping[str, Any]) -> list[str]:
    """Return `architectures` of a parsed `config.json`."""
    names = raw.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def _reject_unsupported(outer: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> None:
    """Reject models that would load but compute something else."""
    names = [reprlib.repr(outer.get("model_type")), reprlib.repr(raw.get("model_type"))]
    if any("k3" in name for name in names):
        raise ConfigError(
            f"`{where}` is of Kimi K3 (model_type {names[0]}): another architecture (2.8 T parameters, linear "
            "attention), which kimi-mlx does not run",
            hint="use a model of the K2 family: `kimi-mlx models` lists them",
        )
    if raw.get("model_type") not in MODEL_TYPES:
        raise ConfigError(
            f"`{where}` has model_type {names[1]}; supported are "
            + ", ".join(f"`{name}`" for name in (*MODEL_TYPES, "kimi_k25")),
            hint="kimi-mlx runs the Kimi K2 family and Moonlight; `kimi-mlx models` lists them",
        )
    expected = {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    for name, value in expected.items():
        if raw.get(name, value) != value:
            raise ConfigError(
                f"`{where}` has {name} = {reprlib.repr(raw[name])}; only {value!r} is supported", hint=INVALID_HINT
            )


def _reject_contradictions(config: ModelConfig, where: str) -> None:
    """Reject numbers that contradict each other."""
    experts, chosen, groups = config.n_routed_experts, config.num_experts_per_tok, config.n_group
    contradiction = None
    if chosen > experts:
        contradiction = f"num_experts_per_tok is {chosen}, but n_routed_experts is only {experts}"
    elif experts % groups or config.topk_group > groups:
        contradiction = f"{experts} experts in n_group = {groups} with topk_group = {config.topk_group}"
    elif groups > 1 and experts < 2 * groups:  # the router ranks a group by its two best experts
        contradiction = f"{experts} experts in n_group = {groups}, fewer than 2 per group"
    elif config.qk_rope_head_dim % 2:
        contradiction = f"qk_rope_head_dim is {config.qk_rope_head_dim}, not even"
    if contradiction is not None:
        raise ConfigError(f"`{where}`: {contradiction}", hint=INVALID_HINT)
