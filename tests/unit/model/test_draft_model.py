"""The draft model against its formula in numpy, and the states that it reads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model.config import load_config, read_json
from kimi_mlx.model.decoder import Model, SequenceSlice
from kimi_mlx.model.device_traits import CPU_TUNING, METAL_TUNING, TUNINGS, Tuning
from kimi_mlx.model.draft_model import DraftModel
from kimi_mlx.runtime.load import load_draft_model
from kimi_mlx.weights.assemble import load_model
from tests.checkpoints import Config
from tests.draft_reference import ReferenceDraft
from tests.drafts import draft_config, draft_tensors, drafted_tokens, write_draft

FOLDER = Path(__file__).parents[3] / "kimi_mlx" / "models" / "kimi-mini"
EAGLE_3 = {"fc_norm": None, "norm_output": None}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(FOLDER, load_config(FOLDER), mx.float32)


def make_draft(tmp_path: Path, model: Model, **fields: object) -> tuple[DraftModel, ReferenceDraft, Config]:
    config = draft_config(read_json(FOLDER / "config.json"), **fields)
    draft = load_draft_model(write_draft(tmp_path / "draft", config), model)
    return draft, ReferenceDraft(config, draft_tensors(config, seed=1)), config


def close(got: mx.array, expected: np.ndarray) -> None:
    got = np.array(got)[0]
    assert got.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()))
    assert np.abs(got - expected).max() < TOLERANCE * scale, np.abs(got - expected).max() / scale


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(EAGLE_3, marks=pytest.mark.slow),
        pytest.param({**EAGLE_3, "norm_before_residual": True}, marks=pytest.mark.slow),
        pytest.param({"draft_vocab_size": 500}, marks=pytest.mark.slow),
        {**EAGLE_3, "draft_vocab_size": 500},
        {"q_lora_rank": None, "rope_scaling": None, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 3]}},
    ],
    ids=["3.1", "3", "3 norm before residual", "3.1 reduced", "3 reduced", "3.1 without q_lora, yarn"],
)
def test_several_steps_of_feeding_back_equal_the_formula(
    tmp_path: Path, model: Model, fields: dict[str, object]
) -> None:
    draft, reference, config = make_draft(tmp_path, model, **fields)
    rng = np.random.default_rng(3)
    size, layers = config["hidden_size"], len(draft.captured_layers)
    tokens = rng.integers(0, config["vocab_size"], 30)
    captured = rng.normal(size=(29, layers, size)).astype(np.float32)
    table = np.array(draft.embed(mx.array(tokens[None])))[0]
    # The prompt in two chunks, without rows 5 and 6, then draft tokens, one row each.
    positions = [i for i in range(29) if i not in (5, 6)]
    states = reference.fuse(list(captured.swapaxes(0, 1)))[positions]
    embeddings = table[[i + 1 for i in positions]]
    got_states = draft.fuse(mx.array(captured[positions].reshape(1, len(positions), -1)))
    close(got_states, states)
    cache, outputs = draft.make_cache(), mx.zeros((1, 0, size))
    for start, stop in ((0, 12), (12, 27)):
        layout = draft.layout([(cache.offset, stop - start)], positions[start:stop])
        rows = mx.array(embeddings[None, start:stop].astype(np.float32)), got_states[:, start:stop]
        outputs = draft(*rows, [cache], layout, [1] if stop == 12 else None)
    expected = reference.outputs(embeddings, states, positions)
    close(outputs, reference.next_states(expected[12:]) if draft.config.norm_output else expected[12:])
    close(draft.logits(outputs), reference.logits(expected[12:]))
    output, drafted = outputs[:, -1:], []
    for position in range(29, 33):
        token = draft.to_token_ids(mx.argmax(draft.logits(output), axis=-1))
        drafted.append(token.item())
        best = int(reference.logits(expected)[-1].argmax())
        assert drafted[-1] == (drafted_tokens(config)[best] if "draft_vocab_size" in fields else best)
        embedding = draft.embed(token)
        embeddings = np.concatenate([embeddings, np.array(embedding)[0]])
        states = np.concatenate([states, reference.next_states(expected[-1:])])
        positions.append(position)
        output = draft(embedding, output, [cache], draft.layout([(cache.offset, 1)], [position]))
        expected = reference.outputs(embeddings, states, positions)
        close(draft.logits(output), reference.logits(expected)[-1:])
    assert cache.offset == 31


@pytest.mark.parametrize("tuning", [CPU_TUNING, METAL_TUNING], ids=["cpu", "metal"])
def test_rows_of_several_sequences_at_once_equal_those_of_each_alone(
    tmp_path: Path, model: Model, tuning: Tuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TUNINGS, "cpu", tuning)
    draft, _, config = make_draft(tmp_path, model)
    mx.random.seed(4)
    size, steps = config["hidden_size"], [(0, 7, 9), (3, 1, 1), (1, 1, 1), (1, 1, 1), (1, 0, 2), (2, 2, 2), (1, 1, 1)]
    together, alone = ([draft.make_cache() for _ in range(3)] for _ in range(2))
    for number, counts in enumerate(steps):
        for cache in (*together, *alone) if number == 3 else ():
            cache.trim(1)  # as after a draft
        embeddings, states = mx.random.normal((2, 1, sum(counts), size))
        # Each sequence lacks its first rows: rows are rotated further than their number in the cache.
        positions = [[5 * i + cache.offset + row for row in range(counts[i])] for i, cache in enumerate(alone)]
        lengths = [(cache.offset, count) for cache, count in zip(together, counts, strict=True)]
        layout = draft.layout(lengths, [position for each in positions for position in each])
        got = draft(embeddings, states, together, layout, [min(count, 1) for count in counts])
        expected, start = [], 0
        for cache, count, own in zip(alone, counts, positions, strict=True):
            if count:
                rows = slice(start, start + count)
                layout = draft.layout([(cache.offset, count)], own)
                expected.append(draft(embeddings[:, rows], states[:, rows], [cache], layout)[:, -1:])
            start += count
        np.testing.assert_allclose(np.array(got), np.array(mx.concatenate(expected, axis=1)), rtol=1e-4, atol=1e-4)


def test_a_draft_model_of_one_thread_is_used_in_another(tmp_path: Path, model: Model) -> None:
    def logits(draft: DraftModel) -> np.ndarray:
        states = draft.fuse(mx.ones((1, 2, 3 * draft.config.target_hidden_size)))
        embeddings = draft.embed(mx.array([[1, 2]]))
        output = draft(embeddings, states, [draft.make_cache()], draft.layout([(0, 2)], [0, 1]))
        return np.array(draft.scatter(draft.logits(output)))

    with ThreadPoolExecutor(1) as thread:
        draft, _, _ = thread.submit(make_draft, tmp_path, model, draft_vocab_size=500).result()
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(logits, draft).result()
    np.testing.assert_array_equal(found, logits(draft))


def test_captured_states_are_the_inputs_of_their_layers_for_all_tokens(model: Model) -> None:
    mx.random.seed(2)
    tokens = mx.random.randint(0, model.config.vocab_size, (1, 20))
    model.hidden(tokens, [SequenceSlice(model.make_cache(), 20)])
    assert model.captured is None
    # The input of layer k is the hidden state of a model of the first k layers.
    expected = []
    layers, count = model.layers, 20
    for k in (0, 2, 3):
        model.layers = layers[:k]
        hidden = model.embed_tokens(tokens)
        if k:
            hidden = model.hidden(tokens, [SequenceSlice(model.make_cache(), count, count)])
        expected.append(hidden)
    model.layers = layers
    model.capture((0, 2, 3))
    for parts in ([(12, 1), (8, 3)], [(12, 0)]):  # two sequences; a chunk without logits
        slices = [SequenceSlice(model.make_cache(), length, num_logits) for length, num_logits in parts]
        total = sum(length for length, _ in parts)
        model.hidden(tokens[:, :total], slices)
        assert model.captured is not None
        states = model.captured.array()
        assert states.shape == (1, total, 3 * model.config.hidden_size)
        of_first = np.array(mx.concatenate(expected, axis=-1)[:, :12])
        np.testing.assert_allclose(np.array(states[:, :12]), of_first, rtol=1e-4, atol=1e-5)
    model.capture(())
    model.hidden(tokens, [SequenceSlice(model.make_cache(), 20)])
    assert model.captured is None
