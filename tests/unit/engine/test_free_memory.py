"""The limits that ranks agree on, and the measured memory of prefill."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from kimi_mlx.engine.agreed_values import agreed_limits, largest_encoding_bytes, rank_shape_of
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished
from kimi_mlx.engine.free_memory import free_memory_bytes
from kimi_mlx.engine.request import Request
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model, SequenceSlice
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.sizing.engine_limits import EngineLimits
from kimi_mlx.sizing.prefill import PREFILL_CHUNK, RankShape, prefill_bytes
from kimi_mlx.sizing.vision import encode_bytes
from kimi_mlx.weights.assemble import load_model
from tests.vision_checkpoints import K2_5

FOLDER = Path(__file__).parents[3] / "kimi_mlx" / "models" / "kimi-mini"
LONG = 65_536


@pytest.fixture
def model() -> Model:
    return load_model(FOLDER, load_config(FOLDER), mx.float32)


def fill(model: Model, tokens: int) -> list:
    """Return a cache with arbitrary rows."""
    cache = model.make_cache()
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    for layer in cache:
        layer.append(mx.random.normal((1, 1, tokens, width)))
    mx.eval([layer.state for layer in cache])
    mx.clear_cache()
    return cache


class Peers(SingleGroup):
    """A group whose other rank chose a chunk of 64."""

    def gather(self, x: mx.array) -> mx.array:
        return mx.stack([x, mx.full(x.shape, 64, x.dtype)])


def test_all_ranks_use_the_smallest_chunk(model: Model) -> None:
    assert agreed_limits(model, SingleGroup()).chunk == PREFILL_CHUNK
    assert agreed_limits(model, Peers()) == EngineLimits(64, 64, sequences=64)
    assert rank_shape_of(model) == RankShape(
        heads=4, expert_rows=96, value_bytes=4, is_fused=False, device="cpu", in_numpy=sys.platform == "linux"
    )
    assert free_memory_bytes() > 0


def test_only_the_rank_with_the_tower_needs_memory_for_encoding(model: Model) -> None:
    assert largest_encoding_bytes(model) == 0
    seeing = load_model(K2_5, load_config(K2_5), mx.float32)
    assert seeing.vision is not None
    assert largest_encoding_bytes(seeing) == encode_bytes(seeing.vision.config, 4, is_fused=False)


@pytest.mark.parametrize(
    ("chunk", "context"), [(128, 1_024), (512, 512), pytest.param(512, 2_048, marks=pytest.mark.slow)]
)
def test_measured_prefill_memory_matches_the_formula(model: Model, chunk: int, context: int) -> None:
    cache = fill(model, context - chunk)
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.hidden(mx.zeros((1, chunk), mx.int32), [SequenceSlice(cache, chunk)]))
    measured = mx.get_peak_memory() - active
    growth = sum(layer.state[0].nbytes for layer in cache) * chunk / context  # the caches have grown, too
    assert 0.5 < (measured - growth) / prefill_bytes(model.config, rank_shape_of(model), chunk, context) < 1.1


@pytest.mark.sweep
def test_the_last_chunk_of_64_k_tokens_takes_little_memory(model: Model) -> None:
    model.layers = model.layers[1:2]
    cache = fill(model, LONG - PREFILL_CHUNK)
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.hidden(mx.zeros((1, PREFILL_CHUNK), mx.int32), [SequenceSlice(cache, PREFILL_CHUNK)]))
    assert mx.get_peak_memory() - active < prefill_bytes(model.config, rank_shape_of(model), PREFILL_CHUNK, LONG)


@pytest.mark.sweep
def test_a_prompt_of_64_k_tokens_takes_little_memory(model: Model) -> None:
    """Slow: more than an hour with MLX's own BLAS on a CPU."""
    random.seed(1)
    prompt = tuple(random.randrange(model.config.vocab_size) for _ in range(LONG - 1))
    end = list(Engine(model).generate(Request(prompt, max_tokens=1)))[-1]
    assert isinstance(end, Finished)
    assert end.statistics.peak_memory_bytes < 200e6
