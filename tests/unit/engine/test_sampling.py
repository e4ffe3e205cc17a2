"""The samplers: the filters are vLLM's, the distribution is the softmax, numbers depend on seed and position."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.engine.request import Sampling
from kimi_mlx.engine.sampling import Sampler, keep_likely

VOCAB_SIZE = 40


def random_logprobs(seed: int, spread: float) -> mx.array:
    logits = np.random.default_rng(seed).normal(size=(3, VOCAB_SIZE)).astype(np.float32) * spread
    return mx.array(logits) - mx.logsumexp(mx.array(logits), axis=-1, keepdims=True)


def keep_as_vllm(logprobs: np.ndarray, top_p: float, top_k: int, min_p: float) -> np.ndarray:
    """Return which tokens vLLM keeps of one row: min_p, then top_k, then top_p over what is left."""
    probabilities = np.exp(logprobs.astype(np.float64))
    kept = probabilities >= min_p * probabilities.max()
    if 0 < top_k < len(logprobs):
        kept &= probabilities >= np.sort(np.where(kept, probabilities, 0))[-top_k]
    left = np.where(kept, probabilities, 0) / probabilities[kept].sum()
    above = np.array([left[left > each].sum() for each in left])
    return kept & (above < top_p) if top_p < 1 else kept


@given(
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 5, VOCAB_SIZE - 1, VOCAB_SIZE, 2 * VOCAB_SIZE]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_the_filters_keep_the_tokens_that_vllm_keeps(
    seed: int, spread: float, top_p: float, top_k: int, min_p: float
) -> None:
    logprobs = random_logprobs(seed, spread)
    kept = np.array(keep_likely(logprobs, Sampling(temperature=1, top_p=top_p, top_k=top_k, min_p=min_p)))
    for row, row_kept in zip(np.array(logprobs), kept, strict=True):
        assert np.isfinite(row_kept).tolist() == keep_as_vllm(row, top_p, top_k, min_p).tolist()
        assert np.array_equal(row_kept[np.isfinite(row_kept)], row[np.isfinite(row_kept)])


def test_the_temperature_applies_before_the_filters() -> None:
    logits = mx.log(mx.array([[0.4, 0.3, 0.2, 0.1]]))
    sampling = Sampling(temperature=0.25, top_p=0.7)  # the first token then has 0.72 of the probability
    assert {int(np.array(Sampler(sampling, seed)(logits, 0))[0]) for seed in range(40)} == {0}


def test_tokens_of_equal_probability_are_kept_together() -> None:
    logprobs = mx.log(mx.array([[0.3, 0.2, 0.2, 0.2, 0.1]]))
    kept = np.isfinite(np.array(keep_likely(logprobs, Sampling(temperature=1, top_k=2))))
    assert kept.tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("temperature", [0.5, *(pytest.param(value, marks=pytest.mark.slow) for value in (1.0, 2.0))])
def test_samples_follow_the_softmax(temperature: float) -> None:
    logits = mx.array([2.0, 1.0, 0.0, -1.0, -mx.inf, 0.5])
    count = 4000
    tokens = Sampler(Sampling(temperature=temperature), seed=7)(mx.broadcast_to(logits, (count, 6)), position=0)
    observed = np.bincount(np.array(tokens), minlength=6)
    expected = np.array(mx.softmax(logits / temperature)) * count
    assert observed[4] == 0
    allowed = expected > 0
    chi_square = ((observed - expected)[allowed] ** 2 / expected[allowed]).sum()
    assert chi_square < 20.5  # 4 degrees of freedom: exceeded once in 2,500 seeds, and this seed is fixed


@given(seed=st.integers(0, 2**63), position=st.integers(0, 10**6), rows=st.integers(1, 5))
def test_a_token_depends_on_its_seed_and_position_not_on_its_neighbours(seed: int, position: int, rows: int) -> None:
    logits = mx.array(np.random.default_rng(0).normal(size=(rows, VOCAB_SIZE)).astype(np.float32))
    sampling = Sampling(temperature=1.0, top_p=0.9)
    sampler = Sampler(sampling, seed)
    alone = [Sampler(sampling, seed)(logits[row : row + 1], position + row).item() for row in range(rows)]
    assert sampler(logits, position).tolist() == alone


def test_seeds_and_positions_give_different_tokens() -> None:
    logits = mx.zeros((30, VOCAB_SIZE))

    def sample(seed: int, position: int) -> Any:
        return Sampler(Sampling(temperature=1.0), seed)(logits, position).tolist()

    assert sample(1, 0) != sample(2, 0)
    assert sample(1, 0)[1:] == sample(1, 1)[:-1]
    assert len(set(sample(1, 0))) > 10
