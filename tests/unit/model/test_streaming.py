"""Streamed experts: the bits of the resident model, slots that nobody computes with, errors, counters."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.errors import EngineError, WeightsError
from kimi_mlx.model import expert_slots
from kimi_mlx.model.config import ModelConfig, load_config
from kimi_mlx.model.decoder import Model, SequenceSlice
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.model.expert_streamer import ExpertStreamer
from kimi_mlx.model.streamed_moe import StreamedMoE
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.parallel.placement import normalize_strategy, place
from kimi_mlx.weights.layer_plan import split_granularity_of
from kimi_mlx.weights.reader import open_checkpoint
from tests.divisible import CONFIGS, make_prompt, write_divisible
from tests.streaming import MemoryReader, load_weights, streamed_model

Weights = tuple[ModelConfig, LayerWeights, list[LayerWeights]]

LAYERS = 4
NUM_STEPS = 9
"""Number of steps of `outputs`."""

BUDGETS = [0, "one", 0.1, 0.5, 1.0]
STRATEGIES = ["hybrid", "tensor", "expert", "hybrid:3:1", "expert:2:1", "pipeline"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_divisible(tmp_path_factory.mktemp("streaming"), "k2", LAYERS)


@pytest.fixture(scope="module")
def weights(folder: Path) -> Weights:
    return load_weights(folder)


@pytest.fixture(scope="module")
def expected(weights: Weights) -> list[np.ndarray]:
    return outputs(Model(*weights))


def outputs(model: Model) -> list[np.ndarray]:
    """Return hidden states or logits of steps of all kinds: chunks of prompts, a batch, single tokens, a draft."""
    caches = [model.make_cache() for _ in range(3)]
    results: list[np.ndarray] = []

    def step(*lengths: int, num_logits: int = 1) -> None:
        tokens = mx.array([make_prompt(sum(lengths), seed=len(results))])
        slices = [
            SequenceSlice(cache, length, min(num_logits, length))
            for cache, length in zip(caches, lengths, strict=False)
            if length
        ]
        if "embed_tokens" not in model:
            model.communicator.recv_from_previous_stage = lambda tokens: states(model, tokens)  # type: ignore[method-assign]
        hidden = model.hidden(tokens, slices)
        if num_logits and model.has_head:
            hidden = model.logits(hidden)
        filled = [array for cache in caches[: len(lengths)] for array in cache[-1].state]
        results.append(np.concatenate([np.array(array).reshape(-1) for array in (hidden, *filled)]))

    step(40)
    step(1)
    step(1, 30, num_logits=0)
    step(1, 1, 7)
    step(4, 1, 1, num_logits=4)
    for layer in caches[0]:
        layer.trim(3)
    for _ in range(3):
        step(1, 1, 1)
    step(1)
    return results


def states(model: Model, tokens: mx.array) -> mx.array:
    """Return hidden states of a previous stage."""
    values = np.random.default_rng(tokens.size).standard_normal((*tokens.shape, model.config.hidden_size))
    return mx.array(values.astype(np.float32))


def streamer_of(model: Model) -> ExpertStreamer:
    assert model.streamer is not None
    return model.streamer


def stats_of(model: Model) -> ExpertStats:
    assert model.expert_stats is not None
    return model.expert_stats


def assert_equal(results: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for number, (result, value) in enumerate(zip(results, expected, strict=True)):
        assert np.array_equal(result, value), f"step {number}"


@pytest.mark.parametrize("budget", BUDGETS)
def test_bits_equal_those_of_the_resident_model(
    budget: float | str, weights: Weights, expected: list[np.ndarray]
) -> None:
    model, reader = streamed_model(weights, budget)
    assert_equal(outputs(model), expected)
    stats = stats_of(model)
    assert (stats.kept_experts == stats.num_experts) == (budget == 1.0)
    assert (stats.misses > 0) == (budget != 1.0)
    reader.close()


@pytest.mark.sweep
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_bits_of_each_share_equal_those_of_the_resident_share(
    name: str, strategy: str, budget: float | str, tmp_path: Path
) -> None:
    check_shares(write_divisible(tmp_path, name, LAYERS), strategy, budget)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["expert:2:1", "tensor"])
def test_bits_of_shares(strategy: str, folder: Path) -> None:
    check_shares(folder, strategy, 0.2)


def check_shares(folder: Path, strategy: str, budget: float | str) -> None:
    """Compare each rank's outputs, on its own, with those of its share with all experts in memory."""
    config, strategy = load_config(folder), normalize_strategy(strategy, 2)
    units = split_granularity_of(open_checkpoint(folder, config).checkpoint, strategy)
    for share in place(config, strategy, 2, units).shares:
        weights = load_weights(folder, share=share)
        model, reader = streamed_model(weights, budget)
        assert_equal(outputs(model), outputs(Model(*weights)))
        reader.close()


@pytest.mark.parametrize("dtype", [mx.bfloat16, pytest.param(mx.float16, marks=pytest.mark.slow)], ids=str)
def test_bits_in_half_precision(folder: Path, dtype: mx.Dtype) -> None:
    weights = load_weights(folder, dtype)
    prompt = mx.array([make_prompt(6, 1)])
    model, reader = streamed_model(weights, 0.3)
    streamed, resident = (np.array(each(prompt).astype(mx.float32)) for each in (model, Model(*weights)))
    assert np.array_equal(streamed, resident)
    reader.close()


def test_slow_reads_in_any_order_change_nothing(weights: Weights, expected: list[np.ndarray]) -> None:
    model, reader = streamed_model(weights, 0.2)
    choose = random.Random(1)
    reader.delay_s = lambda layer, expert: choose.choice((0.0, 0.0, 0.001, 0.004))
    assert_equal(outputs(model), expected)
    reader.close()


def test_a_slot_is_never_written_while_a_step_computes_with_it(
    weights: Weights, expected: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots are given away too early, so the check in begin_read fails; without it, other bits would come out."""
    model, reader = streamed_model(weights, 0)
    monkeypatch.setattr(expert_slots.StagingArea, "release", lambda self, slot: self._free.insert(0, slot))
    with pytest.raises(AssertionError, match="a step still computes with the slot"):
        outputs(model)
    reader.close()


def test_counters_are_exact(weights: Weights) -> None:
    for budget in (0, 0.3, 0.8):
        model, reader = streamed_model(weights, budget)
        before = len(reader.read_experts)
        outputs(model)
        reader.close()
        stats = stats_of(model)
        reads = stats.misses + stats.guesses - stats.guesses_right - stats.guesses_cancelled
        assert len(reader.read_experts) - before == reads
        assert stats.bytes_read == reads * stats.expert_bytes
        assert stats.steps == NUM_STEPS
        assert stats.guesses_right > stats.guesses // 3
        assert stats.hits + stats.misses > 0


def test_no_expert_is_read_twice_for_a_chunk(weights: Weights) -> None:
    model, reader = streamed_model(weights, 0.25)
    before = len(reader.read_experts)
    mx.eval(model(mx.array([make_prompt(80, 5)])))
    reader.close()
    read = reader.read_experts[before:]
    assert len(read) == len(set(read))
    stats = stats_of(model)
    assert stats.hits + stats.misses == stats.num_experts
    assert stats.hits == stats.kept_experts


def test_popular_experts_stay(weights: Weights) -> None:
    """After many steps with the same tokens their experts are kept."""
    model, reader = streamed_model(weights, 0.5)
    cache = model.make_cache()
    tokens = mx.array([make_prompt(4, 9)])
    for _ in range(12):
        mx.eval(model(tokens, cache))
        for each in cache:
            each.trim(4)
    before = stats_of(model)
    mx.eval(model(tokens, cache))
    after = stats_of(model)
    hits, misses = after.hits - before.hits, after.misses - before.misses
    assert hits > 2 * misses
    reader.close()


@pytest.mark.slow
def test_a_failed_read_fails_the_step_and_nothing_else(weights: Weights, expected: list[np.ndarray]) -> None:
    model, reader = streamed_model(weights, 0.4)
    for layer in (1, 3):
        missing = next(expert for expert in range(12) if expert not in kept_experts(model, layer))
        reader.broken = {(layer, missing)}
        with pytest.raises(WeightsError, match=f"expert {missing} of layer {layer} cannot be read"):
            model(mx.array([make_prompt(90, 2)]))
        reader.broken.clear()
        assert_equal(outputs(model), expected)
    reader.close()


def kept_experts(model: Model, layer: int) -> list[int]:
    """Return the experts in the slots of a layer."""
    experts = next(each for each in streamer_of(model).layers if each.layer == layer)
    return [owner for owner in experts.owners.tolist() if owner >= 0]


def test_an_unneeded_expert_that_cannot_be_read_is_no_error(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong guesses fail unnoticed."""
    token = mx.array([make_prompt(1, seed=4)])
    model, reader = streamed_model(weights, 0)
    monkeypatch.setattr(StreamedMoE, "guess", None)
    expected = np.array(model(token))
    needed = set(reader.read_experts)
    monkeypatch.undo()
    monkeypatch.setattr(StreamedMoE, "_likely_experts", lambda self, ids, scores: np.arange(12))
    reader.broken = {(layer, expert) for layer in (1, 2, 3) for expert in range(12)} - needed
    for _ in range(3):
        assert np.array_equal(np.array(model(token)), expected)
    assert stats_of(model).guesses > stats_of(model).guesses_right
    reader.close()


def test_closing_ends_a_step_that_waits(weights: Weights) -> None:
    model, reader = streamed_model(weights, 0, MemoryReader(num_threads=1))
    reader.delay_s = lambda layer, expert: 0.05
    timer = threading.Timer(0.1, streamer_of(model).interrupt)
    timer.start()
    began = time.monotonic()
    with pytest.raises(EngineError, match="closed during a step"):
        model(mx.array([make_prompt(80, 2)]))
    assert time.monotonic() - began < 30
    timer.join()
    with pytest.raises(EngineError, match="closed during a step"):
        model(mx.array([make_prompt(1, 2)]))


def test_a_resident_model_has_no_counters(weights: Weights) -> None:
    assert Model(*weights).expert_stats is None
