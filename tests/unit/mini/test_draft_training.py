"""The training of the draft model: its steps are those of kimi_mlx.model.draft_model, and its data is kimi-mini's."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import kimi_mlx
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Token
from kimi_mlx.engine.request import Request
from kimi_mlx.model.decoder import Model
from kimi_mlx.runtime.load import load_draft_model
from scripts.mini.draft_architecture import DRAFT_VOCAB_SIZE, LAYER_IDS
from scripts.mini.draft_batches import batches, to_arrays
from scripts.mini.draft_data import ROW_LENGTH, TARGET, Sample, Target, frequent_tokens, make_samples
from scripts.mini.draft_export import write_draft
from scripts.mini.draft_model import draft, init_draft, loss
from scripts.mini.model import Parameters
from tests.states import captured_states

pytestmark = pytest.mark.slow  # the samples alone take two seconds


@pytest.fixture(scope="module")
def target() -> Target:
    return Target()


@pytest.fixture(scope="module")
def samples(target: Target) -> list[Sample]:
    return make_samples(target, "test", 4, num_rows=2)


@pytest.fixture(scope="module")
def model() -> Model:
    return kimi_mlx.load(TARGET, dtype="float32")[0]


@pytest.fixture(scope="module")
def drafted(target: Target, samples: list[Sample]) -> np.ndarray:
    return frequent_tokens(samples, DRAFT_VOCAB_SIZE, target.shape.vocab_size)


@pytest.fixture(scope="module")
def parameters(target: Target, drafted: np.ndarray) -> Parameters:
    parameters = init_draft(target.shape, target.head[mx.array(drafted)], seed=3)
    norms = {name: value for name, value in parameters.items() if value.ndim == 1}
    return parameters | {name: value + mx.random.normal(value.shape, scale=0.2) for name, value in norms.items()}


def test_the_steps_of_the_training_are_those_of_drafting(
    tmp_path: Path, target: Target, model: Model, samples: list[Sample], drafted: np.ndarray, parameters: Parameters
) -> None:
    ids, known, num_steps = samples[0].ids, len(samples[0].ids) - 6, 4
    captured = captured_states(model, ids, LAYER_IDS)
    batch = {
        "captured": captured[:, :-1],
        "embeddings": target.embedding[mx.array([ids[1:]])],
        "segments": mx.zeros((1, len(ids) - 1), mx.int32),
    }
    expected = list(draft(parameters, batch, target.shape, num_steps))
    write_draft(tmp_path, parameters, drafted, target.shape, {"step": 0, "tokens": 0})
    draft_model = load_draft_model(tmp_path, model, mx.float32)
    assert draft_model.captured_layers == LAYER_IDS
    cache, states = draft_model.make_cache(), draft_model.fuse(captured[:, :known])
    start = 0
    for step, scores in enumerate(expected):
        stop = known + step
        layout = draft_model.layout([(start, stop - start)], range(start, stop))
        states = draft_model(draft_model.embed(mx.array([ids[start + 1 : stop + 1]])), states, [cache], layout, [1])
        logits = np.array(draft_model.logits(states)[0, 0])
        np.testing.assert_allclose(logits, np.array(scores[0, stop - 1]), atol=2e-4 * np.abs(logits).max())
        start = stop
    assert draft_model.to_token_ids(mx.arange(DRAFT_VOCAB_SIZE)).tolist() == drafted.tolist()


def test_answers_and_states_are_those_of_kimi_mini(model: Model, samples: list[Sample]) -> None:
    for sample in samples[:2]:
        prompt, answer = sample.ids[: sample.answer_start], sample.ids[sample.answer_start :]
        events = Engine(model).generate(Request(tuple(prompt), max_tokens=len(answer)))
        assert [event.id for event in events if isinstance(event, Token)] == answer
        states = np.array(captured_states(model, sample.ids, LAYER_IDS)[0])
        np.testing.assert_allclose(sample.captured, states, atol=5e-3 * np.abs(states).max())


def test_a_perfect_draft_has_a_share_of_one_and_the_loss_falls_with_its_gradient(
    target: Target, samples: list[Sample], drafted: np.ndarray, parameters: Parameters
) -> None:
    batch = to_arrays([samples[:1], samples[1:2]], target.embedding, target.head, drafted)
    (value, shares), gradients = mx.value_and_grad(lambda p: loss(p, batch, target.shape, 2))(parameters)
    assert set(gradients) == set(parameters)
    moved = {name: parameter - 0.02 * gradients[name] for name, parameter in parameters.items()}
    assert float(loss(moved, batch, target.shape, 2)[0]) < float(value)
    assert ((np.array(shares) >= 0) & (np.array(shares) <= 1)).all()
    weights, scores = np.array(batch["weights"]), np.array(batch["scores"])
    rows, positions = weights.nonzero()
    ids = [samples[0].ids, samples[1].ids]
    wanted = drafted[scores.argmax(axis=-1)]
    for row, position in zip(rows, positions, strict=True):
        assert wanted[row, position] == ids[row][position + 2]


def test_batches_hold_each_sample_once(samples: list[Sample]) -> None:
    rows = [row for batch in batches(samples * 40, seed=1) for row in batch]
    assert rows
    assert all(sum(len(sample.ids) for sample in row) <= ROW_LENGTH for row in rows)
    assert sorted(id(sample) for row in rows for sample in row) == sorted(id(sample) for sample in samples * 40)
