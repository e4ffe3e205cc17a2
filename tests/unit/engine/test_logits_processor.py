"""Penalties, bias and minimum length change logits as vLLM documents it, however the tokens of the answer arrived."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.engine.logits_processor import LogitsProcessor, change_logits
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import UsageError

VOCAB_SIZE = 40
TOKENS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=100)


def expected_logits(logits: np.ndarray, request: Request, answer: list[int]) -> np.ndarray:
    """Return logits changed by the formulas of vLLM's documentation, one token after the other."""
    sampling, changed = request.sampling, logits.astype(np.float64).copy()
    for token, bias in request.logit_bias:
        changed[token] += bias
    if len(answer) < request.min_tokens:
        changed[list(request.stop_ids)] = -np.inf
    for token in {*request.prompt, *answer}:
        penalty = sampling.repetition_penalty
        changed[token] = changed[token] / penalty if changed[token] > 0 else changed[token] * penalty
    for token in set(answer):
        changed[token] -= sampling.frequency_penalty * answer.count(token) + sampling.presence_penalty
    return changed


@st.composite
def requests(draw: st.DrawFn) -> Request:
    sampling = Sampling(
        frequency_penalty=draw(st.sampled_from([0.0, 0.5, -2.0])),
        presence_penalty=draw(st.sampled_from([0.0, 1.5, -0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.5])),
    )
    return Request(
        tuple(draw(TOKENS.filter(bool))),
        sampling=sampling,
        logit_bias=tuple(draw(st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-5, 5), max_size=4)).items()),
        stop_ids=frozenset(draw(st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=3))),
        min_tokens=draw(st.sampled_from([0, 1, 30])),
    )


@given(requests(), TOKENS, TOKENS, st.integers(0, 100))
def test_changes_are_those_of_the_formulas(request: Request, answer: list[int], draft: list[int], sent: int) -> None:
    logits = np.random.default_rng(0).normal(size=(len(draft) + 1, VOCAB_SIZE)).astype(np.float32) * 3
    processor = LogitsProcessor.of(request)
    if processor is None:
        assert np.array_equal(expected_logits(logits[0], request, answer), logits[0].astype(np.float64))
        return
    processor.advance(answer)
    given_logits = mx.array(logits)
    changed = np.array(change_logits(given_logits, list(enumerate(processor.changes(draft)))))
    for row in range(len(draft) + 1):
        np.testing.assert_allclose(
            changed[row], expected_logits(logits[row], request, answer + draft[:row]), rtol=1e-5, atol=1e-5
        )
    assert np.array_equal(np.array(given_logits), logits)  # log probabilities are those before the changes
    again = processor.changes(draft[:1])
    resumed = replace(request, prompt=(*request.prompt, *answer[:sent]), answered=len(answer[:sent]))
    after_restart = LogitsProcessor.of(resumed)
    assert after_restart is not None
    after_restart.advance(answer)
    for one, other in zip(again, after_restart.changes(draft[:1]), strict=True):
        mine, theirs = ({id: tuple(v) for id, v in zip(c.ids.tolist(), c.values.T, strict=True)} for c in (one, other))
        neutral = (0.0, 1.0, 0.0)
        assert all(mine.get(id, neutral) == theirs.get(id, neutral) for id in mine.keys() | theirs.keys())


def test_a_request_without_options_has_no_processor() -> None:
    assert LogitsProcessor.of(Request((1, 2), stop_ids=frozenset({3}))) is None
    assert LogitsProcessor.of(Request((1, 2), min_tokens=5), has_min_tokens=False) is None


@pytest.mark.parametrize(
    ("name", "value"), [("frequency_penalty", 2.5), ("presence_penalty", -3), ("repetition_penalty", 0)]
)
def test_penalties_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}, but must be between"):
        Sampling(**{name: value})  # pyright: ignore[reportArgumentType]
