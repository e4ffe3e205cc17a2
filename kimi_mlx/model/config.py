"""`config.json` of the Kimi K2 family: fields, checks, and what follows from them.

Field names are those of the published files. Accepted are `kimi_k2` (K2, K2-Thinking), `kimi_k25` (K2.5 and later,
whose text part sits in `text_config`) and `deepseek_v3` (Moonlight).
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from kimi_mlx.errors import ConfigError

MODEL_TYPES = ("kimi_k2", "deepseek_v3")
"""Values of `model_type` whose mathematics this package has."""

NORM_EPS_LATENT = 1e-6
"""Epsilon of q_a_layernorm and kv_a_layernorm, whatever `rms_norm_eps` says (DeepSeek-V3's published code)."""


@dataclass(frozen=True)
class Quantization:
    """How one weight is quantized: MLX's affine mode, `bits` a value, one scale and bias a group."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class Fp8Blocks:
    """How a checkpoint stores its matrices (K2): 8-bit floats, e4m3, with one `weight_scale_inv` a block."""

    block_rows: int
    block_columns: int


@dataclass(frozen=True)
class PackedInts:
    """How a checkpoint stores its matrices (experts of K2-Thinking, K2.5): packed symmetric integers.

    `bits` a value, one `weight_scale` a group of columns.
    """

    bits: int
    group_size: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (https://arxiv.org/abs/2309.00071), with DeepSeek's mscale rules."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """The text model's dimensions and constants; sizes in elements.

    `compression` is the format of published weights, for those matrices that have its scales. It and `quantization`,
    MLX's own layout, exclude each other.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    q_lora_rank: int | None = None
    n_shared_experts: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    yarn: YarnScaling | None = None
    dtype: str = "bfloat16"
    quantization: Quantization | None = None
    quantization_overrides: Mapping[str, Quantization] = field(default_factory=dict)
    compression: Fp8Blocks | PackedInts | None = None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        """Factor on the attention scores, YaRN's temperature included (DeepSeek-V3's published code)."""
        scale = self.qk_head_dim**-0.5
        if self.yarn is not None and self.yarn.mscale_all_dim:
            scale *= yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2
        return scale

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` has experts rather than one dense MLP."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def quantization_of(self, path: str) -> Quantization | None:
        """What the configuration says of the weight at `path`, such as `model.layers.3.mlp.switch_mlp.up_proj`."""
        return self.quantization_overrides.get(path, self.quantization)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, as DeepSeek-V3's code has it: 0.1 * mscale * ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def load_config(folder: Path) -> ModelConfig:
    """Read and check `config.json` in a checkpoint's folder.

    Raises:
        ConfigError: no such file, no JSON, or a model that we do not have.
    """
    return parse_config(read_json(folder / "config.json"), where=str(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`; ConfigError when it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"`{path}` does not exist", hint="give the folder of a checkpoint: it holds `config.json`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"`{path}` cannot be read: {error}", hint=unreadable_hint(error)) from None
    if not isinstance(value, dict):
        raise ConfigError(f"`{path}` holds {type(value).__name__}, not an object")
    return value


def unreadable_hint(error: Exception) -> str:
    """What the user can do about a file that cannot be read."""
    return "check its permissions" if isinstance(error, PermissionError) else "fetch the file again"


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Turn the contents of `config.json` into a ModelConfig.

    Args:
        raw: the parsed file; K2.5's nested `text_config` is entered.
        where: the name of the file, for messages.

    Raises:
        ConfigError: an unsupported architecture, a missing field or a wrong value.
    """
    outer = raw
    raw = _object(outer, "text_config", where) or outer
    _refuse_foreign(outer, raw, where)
    theta, yarn = _parse_rope(raw, where)
    dtype = _first(raw.get("torch_dtype"), raw.get("dtype"), outer.get("dtype"))
    quantization, overrides, compression = _parse_quantization(outer, raw, where)
    plain = _checked_fields(ModelConfig, {**raw, "rope_theta": theta, "dtype": dtype}, where)
    config = ModelConfig(
        **plain,
        yarn=yarn,
        quantization=quantization,
        quantization_overrides=overrides,
        compression=compression,
    )
    _refuse_contradictions(config, where)
    return config


class ValueRange(NamedTuple):
    """The numbers that a field may have: from `low`, or above it, to `high`; or only `choices`."""

    low: float = 1
    high: float = 2**40
    is_above: bool = False
    choices: tuple[int, ...] = ()

    def allow(self, value: float) -> bool:
        """Whether `value` is within; NaN never is."""
        if self.choices:
            return value in self.choices
        return self.low <= value <= self.high and not (self.is_above and value == self.low)

    def __str__(self) -> str:
        if self.choices:
            return f"among {', '.join(map(str, self.choices))}"
        return f"{'above' if self.is_above else 'from'} {self.low} to {self.high}"


_POSITIVE = ValueRange(1e-6)  # far below every sensible value, and logarithms and quotients stay finite

LIMITS = {
    "num_hidden_layers": ValueRange(1, 1_000),
    "n_routed_experts": ValueRange(1, 100_000),
    "num_experts_per_tok": ValueRange(1, 100_000),
    "n_shared_experts": ValueRange(0, 100_000),
    "first_k_dense_replace": ValueRange(0),
    "rms_norm_eps": ValueRange(0, 1, is_above=True),
    "rope_theta": ValueRange(1, is_above=True),
    "routed_scaling_factor": _POSITIVE,
    "factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "mscale": ValueRange(0),
    "mscale_all_dim": ValueRange(0),
    "bits": ValueRange(choices=(2, 3, 4, 5, 6, 8)),
    "group_size": ValueRange(choices=(32, 64, 128)),
}
"""Of the fields of ModelConfig, YarnScaling and Quantization that do not have the usual `ValueRange()`."""

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}
_TYPES = {"int": int, "float": float, "bool": bool, "str": str}


def _checked_fields(
    target: type[ModelConfig | YarnScaling | Quantization], raw: Mapping[str, Any], where: str, prefix: str = ""
) -> dict[str, Any]:
    """Check and convert what `raw` says of the plain fields of `target`; null counts as absent.

    Args:
        target: its annotations say the kinds, its defaults what may be absent.
        raw: an object of the file.
        where: the name of the file.
        prefix: of the fields in messages, such as `rope_scaling.`.
    """
    values: dict[str, Any] = {}
    missing: list[str] = []
    for item in fields(target):
        kind = str(item.type).removesuffix(" | None")
        if kind in _KINDS and raw.get(item.name) is not None:
            values[item.name] = _checked(
                raw[item.name], kind, LIMITS.get(item.name, ValueRange()), where, prefix + item.name
            )
        elif item.default is MISSING and item.default_factory is MISSING:
            missing.append(f"`{prefix}{item.name}`")
    if missing:
        raise ConfigError(f"`{where}` lacks {', '.join(sorted(missing))}")
    return values


def _checked(value: Any, kind: str, limits: ValueRange, where: str, name: str) -> Any:
    """Return `value` as the type of its kind; ConfigError unless it is of that kind and within the limits."""
    wanted = _KINDS[kind]
    if kind in ("bool", "str"):
        is_valid = isinstance(value, _TYPES[kind])
    else:
        wanted += f" {limits}"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_valid = is_number and limits.allow(value) and (kind == "float" or value == int(value))
    if not is_valid:
        raise ConfigError(f"`{where}` has {name} = {reprlib.repr(value)}, not {wanted}")
    return _TYPES[kind](value)


def _first(*values: Any) -> Any:
    """The first value that is not null, if any."""
    return next((value for value in values if value is not None), None)


def _object(raw: Mapping[str, Any], name: str, where: str, prefix: str = "") -> Mapping[str, Any]:
    """The object at `name`, empty if absent or null; `prefix` is of the name in messages."""
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"`{where}` has {prefix}{name} = {reprlib.repr(value)}, not an object")
    return value


def _refuse_foreign(outer: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> None:
    """Refuse what would load but compute something else."""
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
            raise ConfigError(f"`{where}` has {name} = {reprlib.repr(raw[name])}; only {value!r} is supported")


def _parse_rope(raw: Mapping[str, Any], where: str) -> tuple[Any, YarnScaling | None]:
    """Read rope_theta, unchecked, and YaRN from `rope_scaling`, or from transformers 5's `rope_parameters`."""
    new = _object(raw, "rope_parameters", where)
    old = _object(raw, "rope_scaling", where)
    name, scaling = ("rope_scaling", old) if old else ("rope_parameters", new)
    theta = _first(raw.get("rope_theta"), new.get("rope_theta"), 10000.0)
    kind = _first(scaling.get("type"), scaling.get("rope_type"), "default")
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ConfigError(f"`{where}` has rope scaling {reprlib.repr(kind)}; supported are `yarn` and none")
    return theta, YarnScaling(**_checked_fields(YarnScaling, scaling, where, f"{name}."))


def _parse_quantization(
    outer: Mapping[str, Any], raw: Mapping[str, Any], where: str
) -> tuple[Quantization | None, dict[str, Quantization], Fp8Blocks | PackedInts | None]:
    """Read MLX's `quantization` block with its per-path overrides, or else the format of published weights."""
    names = ("quantization", "quantization_config")  # mlx-lm writes a copy of the first as the second
    blocks = [(name, block) for name in names for level in (outer, raw) if (block := _object(level, name, where))]
    if not blocks:
        return None, {}, None
    name, block = blocks[0]
    if name == "quantization_config" and "quant_method" in block:
        return None, {}, _parse_compression(block, where)
    default = _one_quantization(block, where, name)
    overrides = {
        path.removeprefix("language_model."): _one_quantization({**block, **value}, where, f"{name}.{path}")
        for path, value in block.items()
        if isinstance(value, Mapping)  # false says of a matrix without scales that it has none
    }
    return default, overrides, None


def _parse_compression(block: Mapping[str, Any], where: str) -> Fp8Blocks | PackedInts:
    """Read the `quantization_config` of published weights: Moonshot's FP8 or INT4."""
    method = block["quant_method"]
    if method == "fp8":
        return _parse_fp8(block, where)
    if method == "compressed-tensors":
        return _parse_packed(block, where)
    raise ConfigError(
        f"`{where}`: quantization method {reprlib.repr(method)} is not supported; supported are 'fp8', "
        "'compressed-tensors' and MLX's affine layout",
        hint=_FORMAT_HINT,
    )


_FORMAT_HINT = "use a checkpoint as Moonshot publishes it or one of mlx-community: `kimi-mlx models` lists them"

PACKED: Mapping[str, tuple[Any, ...]] = {"format": ("pack-quantized",), "transform_config": (None, {})}
PACKED_GROUP: Mapping[str, tuple[Any, ...]] = {
    "format": ("pack-quantized", None),
    "input_activations": (None,),
    "output_activations": (None,),
}
PACKED_WEIGHTS: Mapping[str, tuple[Any, ...]] = {
    "num_bits": (4, 8),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group",),
    "group_size": (32, 64, 128),
    "actorder": (None, False),
}
"""What compressed-tensors' `quantization_config`, its one group and the weights there may say: then the weights are
MLX's affine layout in other words, and nothing else is rounded."""


def _parse_fp8(block: Mapping[str, Any], where: str) -> Fp8Blocks:
    """Check `{fmt, weight_block_size}`; how activations would be quantized is of no concern, we keep them float."""
    name = "quantization_config."
    _require(block, {"fmt": ("e4m3", None)}, where, name)
    size = block.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2:
        raise ConfigError(
            f"`{where}` has {name}weight_block_size = {reprlib.repr(size)}, not two whole numbers: fp8 is supported "
            "with scales by blocks",
            hint=_FORMAT_HINT,
        )
    rows, columns = (_checked(value, "int", ValueRange(), where, f"{name}weight_block_size") for value in size)
    return Fp8Blocks(rows, columns)


def _parse_packed(block: Mapping[str, Any], where: str) -> PackedInts:
    """Check compressed-tensors' block: one group, whose weights are packed symmetric integers; nothing else is."""
    name = "quantization_config."
    _require(block, PACKED, where, name)
    groups = _object(block, "config_groups", where, name)
    if len(groups) != 1:
        raise ConfigError(f"`{where}` has {len(groups)} {name}config_groups; supported is one", hint=_FORMAT_HINT)
    (key,) = groups
    group = _object(groups, key, where, f"{name}config_groups.")
    name += f"config_groups.{key}."
    _require(group, PACKED_GROUP, where, name)
    weights = _object(group, "weights", where, name)
    _require(weights, PACKED_WEIGHTS, where, f"{name}weights.")
    return PackedInts(int(weights["num_bits"]), int(weights["group_size"]))


def _require(block: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], where: str, prefix: str) -> None:
    """Refuse a block that has something else than the allowed values, which include None for what may be absent."""
    for name, values in allowed.items():
        if block.get(name) not in values:
            supported = " or ".join(repr(value) for value in values if value) or "none"
            raise ConfigError(
                f"`{where}` has {prefix}{name} = {reprlib.repr(block.get(name))}; supported is {supported}",
                hint=_FORMAT_HINT,
            )


def _one_quantization(block: Mapping[str, Any], where: str, name: str) -> Quantization:
    """Check one `{bits, group_size, mode}`."""
    if block.get("mode") not in (None, "affine"):
        raise ConfigError(f"`{where}` has {name}.mode = {reprlib.repr(block['mode'])}; only 'affine' is supported")
    return Quantization(**_checked_fields(Quantization, block, where, f"{name}."))


def _refuse_contradictions(config: ModelConfig, where: str) -> None:
    """Refuse numbers that contradict each other."""
    experts, chosen, groups = config.n_routed_experts, config.num_experts_per_tok, config.n_group
    if chosen > experts:
        raise ConfigError(f"`{where}`: num_experts_per_tok is {chosen}, but n_routed_experts only {experts}")
    if experts % groups or config.topk_group > groups:
        raise ConfigError(f"`{where}`: {experts} experts in n_group = {groups} with topk_group = {config.topk_group}")
    if groups > 1 and experts < 2 * groups:  # the router ranks a group by its two best experts
        raise ConfigError(f"`{where}`: {experts} experts in n_group = {groups}, fewer than 2 a group")
    if config.qk_rope_head_dim % 2:
        raise ConfigError(f"`{where}`: qk_rope_head_dim is {config.qk_rope_head_dim}, not even")
