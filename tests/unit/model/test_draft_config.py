"""`config.json` of draft models: published fields, conventions, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.errors import ConfigError
from kimi_mlx.model.config import ModelConfig, is_draft_config, load_config, read_json
from kimi_mlx.model.draft_config import canonical_name, load_draft_config, parse_draft_config
from tests.drafts import PUBLISHED, draft_config
from tests.fakes import KIMI_MINI

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def target() -> ModelConfig:
    return load_config(KIMI_MINI)


def k2(layers: int = 61) -> ModelConfig:
    """Return the dimensions that a draft model of K2 must fit."""
    return replace(load_config(KIMI_MINI), hidden_size=7168, vocab_size=163840, num_hidden_layers=layers)


def test_the_published_fields_are_read() -> None:
    config = parse_draft_config(
        {
            **PUBLISHED,
            "rope_scaling": {
                "type": "yarn",
                "factor": 64.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
            },
        }
    )
    assert (config.fc_norm, config.norm_output, config.norm_before_residual) == (True, True, False)
    assert config.yarn is not None
    assert config.yarn.factor == 64
    assert config.latent_norm_eps == config.rms_norm_eps == 1e-5
    assert config.target_hidden_size == 7168
    assert config.captured_layers(k2()) == (2, 30, 58)


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"eagle_config": {LAYER_IDS: [2, 30, 58]}}, (2, 30, 58)),
        ({"eagle_config": {LAYER_IDS: [1, 29, 57]}}, (2, 30, 58)),  # outputs of these layers
        ({"eagle_config": None}, (2, 30, 58)),
        ({"eagle_config": None, LAYER_IDS: [0, 20, 60]}, (0, 20, 60)),
        ({"eagle_config": {LAYER_IDS: [2, 58]}}, (2, 58)),
    ],
)
def test_captured_layers_are_numbers_of_inputs(fields: dict[str, Any], layers: tuple[int, ...]) -> None:
    config = parse_draft_config({**PUBLISHED, **fields})
    assert config.captured_layers(k2()) == layers
    assert config.num_captured == len(layers)


def test_defaults_are_those_of_eagle_3() -> None:
    raw = {
        name: value for name, value in PUBLISHED.items() if name not in ("fc_norm", "norm_output", "draft_vocab_size")
    }
    config = parse_draft_config(raw)
    assert (config.fc_norm, config.norm_output, config.draft_vocab_size) == (False, False, 163840)
    assert parse_draft_config({**raw, "use_aux_norm": True}).fc_norm


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "architectures are 'LlamaForCausalLMEagle3', not 'Eagle3Deep"),
        ({"architectures": None}, "architectures are none"),
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2; only 1"),
        ({"attention_bias": True}, "attention_bias = True; only False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True; only False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; only 'silu'"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "eagle_config.use_aux_hidden_state = False; only True"),
        ({"eagle_config": []}, "eagle_config = [], not an object"),
        ({"eagle_config": {LAYER_IDS: "2,30,58"}}, "= '2,30,58', not a list of layers"),
        ({"eagle_config": {LAYER_IDS: []}}, "not a list of layers"),
        ({"eagle_config": {LAYER_IDS: [2, 2.5]}}, "= 2.5, not a whole number"),
        (
            {"eagle_config": {LAYER_IDS: list(range(17))}},
            "17 layers in eagle_config.eagle_aux_hidden_state_layer_ids; at",
        ),
        ({"eagle_config": {LAYER_IDS: [2, 58, 30]}}, "= [2, 58, 30], not ascending"),
        ({"eagle_config": {LAYER_IDS: [2, 2, 30]}}, "= [2, 2, 30], not ascending"),
        ({"fc_norm": 1}, "fc_norm = 1, not true or false"),
        ({"norm_output": "yes"}, "norm_output = 'yes', not true or false"),
        ({"draft_vocab_size": 163841}, "draft_vocab_size is 163841, but vocab_size is only 163840"),
        ({"draft_vocab_size": 0}, "draft_vocab_size = 0, not a whole number"),
        ({"hidden_size": None}, "lacks `hidden_size`, `target_hidden_size`"),
        ({"kv_lora_rank": None}, "lacks `kv_lora_rank`"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63, not even"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling 'linear'"),
    ],
)
def test_an_unsupported_or_invalid_file_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_draft_config({**PUBLISHED, **fields}, where="draft/config.json")
    assert "`draft/config.json`" in error.value.message
    assert message in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"layers": 50}, "the draft model reads the inputs of layers 2, 30, 58, but the model has 50 layers"),
        ({"layers": 58}, "inputs of layers 2, 30, 58, but the model has 58 layers"),
    ],
)
def test_a_draft_model_of_a_deeper_model_is_an_error(target: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_draft_config(PUBLISHED).captured_layers(k2(**target))
    assert message in error.value.message


def test_a_draft_model_of_another_model_is_an_error_with_both_numbers(target: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="hidden states of size 7168, but the model has 128"):
        parse_draft_config(PUBLISHED).captured_layers(target)
    config = draft_config(read_json(KIMI_MINI / "config.json"), vocab_size=1800)
    with pytest.raises(ConfigError, match="a vocabulary of 1800, but the model has 1792"):
        parse_draft_config(config).captured_layers(target)
    with pytest.raises(ConfigError, match="layers 2, 2, 1, but the model has 4 layers"):
        parse_draft_config({**config, "vocab_size": 1792, "eagle_config": None}).captured_layers(target)


def test_a_folder_without_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_draft_config(tmp_path)


def test_draft_models_are_recognized_by_their_architecture() -> None:
    assert is_draft_config(PUBLISHED)
    assert is_draft_config({"architectures": ["LlamaForCausalLMEagle3"]})
    assert not is_draft_config(read_json(KIMI_MINI / "config.json"))
    assert not is_draft_config({"architectures": "Eagle"})


@pytest.mark.parametrize("name", ["midlayer.mlp.up_proj", "layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"])
def test_names_of_the_layer_have_one_canonical_form(name: str) -> None:
    assert canonical_name(name) == "midlayer.mlp.up_proj"
    assert canonical_name("model.fc.weight") == canonical_name("fc.weight") == "fc.weight"
