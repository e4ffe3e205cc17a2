"""`config.json` of a draft model: EAGLE-3 or 3.1 with latent attention (MLA), as published for K2.5 to K2.7.

Field names are those of the published files, whose `architectures` is `Eagle3DeepseekV2ForCausalLM`. EAGLE-3.1 is
`fc_norm` and `norm_output`; both are false in files of EAGLE-3.
Source: EAGLE-3 (https://arxiv.org/abs/2503.01840), and the layouts that vLLM and SGLang load.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_mlx.errors import ConfigError
from kimi_mlx.model.config import DecoderConfig, ModelConfig, architectures, read_json
from kimi_mlx.model.config_quantization import parse_quantization
from kimi_mlx.model.config_rope import parse_rope
from kimi_mlx.model.config_values import INVALID_HINT, ValueRange, check_fields, check_value, first_given, get_object

ARCHITECTURES = ("Eagle3DeepseekV2ForCausalLM", "Eagle3DeepseekV3ForCausalLM")
"""Supported values in `architectures`; both name the same model."""

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
"""Field of `eagle_config`, or of the top level, with the layers whose states the draft model reads."""

LAYER = "midlayer."
"""Beginning of the canonical names of the layer's tensors."""

NUM_DEFAULT_LAYERS = 3
"""Number of layers where the file names none."""

MAX_CAPTURED_LAYERS = 16
"""Maximum number of captured layers. Published draft models have 3."""

UNSUPPORTED_HINT = "use a draft model of the MLA kind, such as lightseekorg/kimi-k2.6-eagle3.1-mla"
"""Hint for a draft model that is not supported."""


@dataclass(frozen=True, kw_only=True)
class DraftConfig(DecoderConfig):
    """Dimensions and constants of a draft model; sizes in elements.

    Args:
        target_hidden_size: hidden size of the model for which it drafts.
        draft_vocab_size: number of tokens that it can draft, at most vocab_size.
        fc_norm: whether each captured state is normed before `fc` (EAGLE-3.1).
        norm_output: whether the normed output is fed back (EAGLE-3.1) instead of the output itself.
        norm_before_residual: whether the residual is the normed input of the layer instead of the input itself.
        layer_ids: layers of the model whose inputs are captured, ascending; None for the default.
    """

    target_hidden_size: int
    draft_vocab_size: int
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    layer_ids: tuple[int, ...] | None = None

    @property
    def latent_norm_eps(self) -> float:
        """Epsilon of q_a_layernorm and kv_a_layernorm: in draft models that of all norms."""
        return self.rms_norm_eps

    @property
    def num_captured(self) -> int:
        """Number of captured states per token."""
        return NUM_DEFAULT_LAYERS if self.layer_ids is None else len(self.layer_ids)

    def captured_layers(self, config: ModelConfig) -> tuple[int, ...]:
        """Return the layers of the model whose inputs are captured: numbers from 0, ascending.

        Raises:
            ConfigError: the draft model is made for another model: sizes or layers do not fit.
        """
        count = config.num_hidden_layers
        sizes = [
            ("hidden states of size", self.target_hidden_size, config.hidden_size),
            ("a vocabulary of", self.vocab_size, config.vocab_size),
        ]
        for name, expected, size in sizes:
            if expected != size:
                raise _misfit_error(f"the draft model is made for {name} {expected}, but the model has {size}")
        layers = (2, count // 2, count - 3) if self.layer_ids is None else self.layer_ids
        if not all(first < second for first, second in zip((-1, *layers), (*layers, count), strict=True)):
            names = ", ".join(map(str, layers))
            raise _misfit_error(f"the draft model reads the inputs of layers {names}, but the model has {count} layers")
        return layers


def canonical_name(name: str) -> str:
    """Return the canonical name of a tensor, or path of a matrix: published files name the layer in several ways."""
    name = name.removeprefix("model.")
    return LAYER + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def load_draft_config(folder: Path) -> DraftConfig:
    """Read and check `config.json` in the folder of a draft model.

    Raises:
        ConfigError: the file is missing or is not JSON, or it is not that of a supported draft model.
    """
    return parse_draft_config(read_json(folder / "config.json"), where=str(folder / "config.json"))


def parse_draft_config(raw: Mapping[str, Any], where: str = "config.json") -> DraftConfig:
    """Turn the contents of `config.json` into a DraftConfig.

    Args:
        raw: the parsed file.
        where: name of the file, for messages.

    Raises:
        ConfigError: another architecture, a missing field or an invalid value.
    """
    _reject_unsupported(raw, where)
    theta, yarn = parse_rope(raw, where)
    quantization, overrides, compression = parse_quantization(raw, raw, where)
    values = {
        **raw,
        "rope_theta": theta,
        "dtype": first_given(raw.get("torch_dtype"), raw.get("dtype")),
        "target_hidden_size": first_given(raw.get("target_hidden_size"), raw.get("hidden_size")),
        "draft_vocab_size": first_given(raw.get("draft_vocab_size"), raw.get("vocab_size")),
        "fc_norm": first_given(raw.get("fc_norm"), raw.get("use_aux_norm")),  # the second is an older name
    }
    config = DraftConfig(
        **check_fields(DraftConfig, values, where),
        yarn=yarn,
        quantization=quantization,
        quantization_overrides={canonical_name(path): value for path, value in overrides.items()},
        compression=compression,
        layer_ids=_parse_layer_ids(raw, where),
    )
    _reject_contradictions(config, where)
    return config


def _reject_unsupported(raw: Mapping[str, Any], where: str) -> None:
    """Reject files of other models, and draft models that would compute something else."""
    names = architectures(raw)
    if not set(names) & set(ARCHITECTURES):
        listed = " and ".join(map(reprlib.repr, names)) or "none"
        raise ConfigError(
            f"`{where}` is not that of a draft model that kimi-mlx supports: architectures are {listed}, not "
            f"'{ARCHITECTURES[0]}'",
            hint=UNSUPPORTED_HINT,
        )
    eagle = get_object(raw, "eagle_config", where)
    expected = [
        (raw, "", "num_hidden_layers", 1),
        (raw, "", "hidden_act", "silu"),
        (raw, "", "attention_bias", False),
        (raw, "", "mlp_bias", False),
        (raw, "", "bias", False),
        (raw, "", "tie_word_embeddings", False),
        (raw, "", "logit_scale", 1.0),
        (eagle, "eagle_config.", "use_aux_hidden_state", True),
    ]
    for values, prefix, name, value in expected:
        if first_given(values.get(name), value) != value:
            raise ConfigError(
                f"`{where}` has {prefix}{name} = {reprlib.repr(values[name])}; only {value!r} is supported",
                hint=UNSUPPORTED_HINT,
            )


def _parse_layer_ids(raw: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    """Return the layers whose inputs are captured, from `eagle_config` or the top level.

    Published files follow one of two conventions: numbers of the layers whose outputs are read, which begin with 1, or
    of the layers whose inputs are read, which begin with 2 for the same states (gh:sgl-project/sglang#25454).
    """
    eagle = get_object(raw, "eagle_config", where)
    prefix = "eagle_config." if eagle.get(LAYER_IDS) is not None else ""
    ids = (eagle if prefix else raw).get(LAYER_IDS)
    if ids is None:
        return None
    if not isinstance(ids, list) or not ids:
        raise ConfigError(
            f"`{where}` has {prefix}{LAYER_IDS} = {reprlib.repr(ids)}, not a list of layers", hint=INVALID_HINT
        )
    if len(ids) > MAX_CAPTURED_LAYERS:
        raise ConfigError(
            f"`{where}` has {len(ids)} layers in {prefix}{LAYER_IDS}; at most {MAX_CAPTURED_LAYERS} are supported",
            hint=UNSUPPORTED_HINT,
        )
    layers = [check_value(id, "int", ValueRange(0, 1_000), where, prefix + LAYER_IDS) for id in ids]
    if layers != sorted(set(layers)):
        raise ConfigError(f"`{where}` has {prefix}{LAYER_IDS} = {layers}, not ascending", hint=INVALID_HINT)
    return tuple(layer + (layers[0] == 1) for layer in layers)


def _reject_contradictions(config: DraftConfig, where: str) -> None:
    """Reject numbers that contradict each other."""
    contradiction = None
    if config.draft_vocab_size > config.vocab_size:
        contradiction = f"draft_vocab_size is {config.draft_vocab_size}, but vocab_size is only {config.vocab_size}"
    elif config.qk_rope_head_dim % 2:
        contradiction = f"qk_rope_head_dim is {config.qk_rope_head_dim}, not even"
    if contradiction is not None:
        raise ConfigError(f"`{where}`: {contradiction}", hint=INVALID_HINT)


def _misfit_error(message: str) -> ConfigError:
    return ConfigError(message, hint="use a draft model that is made for this model: `kimi-mlx models` lists them")
