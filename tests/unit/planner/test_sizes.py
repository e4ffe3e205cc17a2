"""Sizes of models and of their shares: shares cover the model, and totals equal the catalogue's."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.hub.catalogue import catalogue, find_entry
from kimi_mlx.model.config import load_config
from kimi_mlx.parallel.placement import STRATEGIES, StrategyName
from kimi_mlx.planner.constants import KIMI_MLX
from kimi_mlx.planner.machines import parse_machines
from kimi_mlx.planner.memory import longest_context, workspace_bytes
from kimi_mlx.planner.model_shape import known_models, known_shape, shape_of_config, with_expert_bits
from kimi_mlx.planner.portions import Portion, make_portions
from kimi_mlx.sizing.kv_cache import kv_bytes_per_token
from tests.fakes import KIMI_MINI

K2 = known_shape("kimi-k2")
WEIGHTS = st.lists(st.integers(1, 100), min_size=1, max_size=8)


@pytest.mark.parametrize("alias", known_models())
def test_totals_equal_the_catalogue(alias: str) -> None:
    entry, shape = find_entry(alias), known_shape(alias)
    assert entry is not None
    assert shape.weights_bytes == pytest.approx(entry.weights_bytes, rel=0.01)
    assert kv_bytes_per_token(shape.config) == entry.kv_bytes_per_token
    assert shape.context_tokens == entry.context_tokens


def test_every_downloadable_model_is_known() -> None:
    assert set(known_models()) == {entry.alias for entry in catalogue() if entry.repository is not None}


def test_k2_parameter_count() -> None:
    assert sum(portion.held(K2.values, K2) for portion in make_portions("hybrid", K2, 1)) == pytest.approx(
        1.0264e12, rel=1e-3
    )


def test_a_checkpoint_in_a_folder() -> None:
    shape = shape_of_config("kimi-mini", load_config(KIMI_MINI))
    stored = (KIMI_MINI / "model.safetensors").stat().st_size
    assert shape.weights_bytes == pytest.approx(stored, rel=0.02)  # norms and the file's header are not counted


def test_published_int4_is_counted_with_mlx_biases(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    published = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    text = {**asdict(K2.config), "rope_scaling": None, "quantization_config": published}
    vision = known_shape("kimi-k2.5").config.vision
    assert vision is not None
    config = {"model_type": "kimi_k25", "text_config": text, "vision_config": asdict(vision)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of_config("k2.5", load_config(tmp_path)).bytes == known_shape("kimi-k2.5").bytes


def test_fewer_bits_need_less_memory() -> None:
    sizes = [with_expert_bits(K2, bits).weights_bytes for bits in (2, 3, 4, 8)]
    assert sizes == sorted(sizes)
    assert with_expert_bits(K2, 4).bytes.expert == pytest.approx(K2.bytes.expert)
    assert with_expert_bits(K2, 4).bytes.heads == pytest.approx(K2.bytes.heads * 8.5 / 4.5)


@given(st.sampled_from(STRATEGIES), WEIGHTS)
def test_portions_cover_the_model(strategy: StrategyName, weights: list[int]) -> None:
    portions = make_portions(":".join([strategy, *map(str, weights)]), K2, len(weights))
    if len(weights) == 1 or strategy == "pipeline":
        assert sum(portion.layers for portion in portions) == K2.layers
        assert sum(portion.held(K2.bytes, K2) for portion in portions) == pytest.approx(K2.weights_bytes)
        return
    for names in (("head",), ("expert_rows", "experts"), ("shared_rows",), ("dense_rows",)):
        shares = [[getattr(portion, name) for name in names] for portion in portions]
        product = sum(share[0] * share[-1] if len(share) > 1 else share[0] for share in shares)
        assert product == pytest.approx(1)
    if strategy == "tensor":
        assert sum(portion.heads for portion in portions) == pytest.approx(1)
    without_copies = sum(portion.held(K2.bytes, K2) for portion in portions) - (len(portions) - 1) * _replicated_bytes(
        portions[0]
    )
    assert without_copies == pytest.approx(K2.weights_bytes)


def _replicated_bytes(portion: Portion) -> float:
    """Return the bytes that every rank holds."""
    heads = 0 if portion.heads < 1 else K2.bytes.heads + K2.bytes.expansion
    return K2.bytes.embedding + K2.layers * (K2.bytes.latent + heads) + K2.moe_layers * K2.bytes.router


def test_longest_context() -> None:
    machines = parse_machines("m3-ultra-512x2")
    small = make_portions("hybrid", K2, 2)
    assert longest_context(machines, small, K2, KIMI_MLX, is_raised=False) == K2.context_tokens
    one = parse_machines("m3-ultra-512")
    assert longest_context(one, make_portions("hybrid", K2, 1), K2, KIMI_MLX, is_raised=True) == 0
    three_bits = with_expert_bits(K2, 3)
    portions = make_portions("hybrid", three_bits, 1)
    assert longest_context(one, portions, three_bits, KIMI_MLX, is_raised=False) == 0
    assert longest_context(one, portions, three_bits, KIMI_MLX, is_raised=True) == K2.context_tokens


def test_the_workspace_of_prefill_has_no_attention_scores() -> None:
    portion = make_portions("hybrid", K2, 1)[0]
    sizes = [workspace_bytes(portion, K2, KIMI_MLX, context) for context in (64 * 1024, 128 * 1024)]
    assert sizes[1] < 2 * sizes[0]
    assert sizes[1] < 12e9
