"""Drafts of a draft model: their tokens, and that the text never depends on them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.engine import engine as engine_module
from kimi_mlx.engine.drafts.drafter import Draft, Offer
from kimi_mlx.engine.drafts.model_drafter import ModelDrafter
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.kv_cache_pool import shape_of
from kimi_mlx.engine.prompt_cache.block_file import BLOCK_TOKENS
from kimi_mlx.engine.prompt_cache.block_store import BlockStore
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.engine.sequence import Sequence as EngineSequence
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model, SequenceSlice
from kimi_mlx.model.draft_model import DraftModel
from kimi_mlx.runtime.load import load_draft_model
from kimi_mlx.weights.assemble import load_model
from tests.checkpoints import load_golden, write_checkpoint
from tests.drafters import RandomPlanner
from tests.drafts import draft_config, write_draft
from tests.unit.engine.drafts.test_modes import Answers, answer, make_prompt

GOLDEN = load_golden("k2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_checkpoint(tmp_path_factory.mktemp("k2"), GOLDEN.config, GOLDEN.seed)
    return load_model(folder, load_config(folder), mx.float32)


def make_draft(folder: Path, model: Model, **fields: object) -> DraftModel:
    layers = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}
    draft = load_draft_model(write_draft(folder, draft_config(GOLDEN.config, **{**layers, **fields})), model)
    model.capture(draft.captured_layers)
    return draft


class RecordingDrafter(ModelDrafter):
    """A drafter that keeps its drafts, with the tokens before them."""

    def __init__(self, model: DraftModel):
        super().__init__(model)
        self.drafts: list[tuple[list[int], Draft]] = []

    def draft(self, requests: Sequence[tuple[EngineSequence, Offer, int]]) -> list[Draft]:
        """Keep the drafts."""
        tokens = [list(sequence.tokens) for sequence, _, _ in requests]
        drafts = super().draft(requests)
        self.drafts += zip(tokens, drafts, strict=True)
        assert all(len(draft) == length for draft, (_, _, length) in zip(drafts, requests, strict=True))
        return drafts


def reference(model: Model, draft: DraftModel, tokens: list[int], length: int) -> Draft:
    """Return the most likely draft after `tokens`, computed at once from all states."""
    model.hidden(mx.array([tokens[:-1]]), [SequenceSlice(model.make_cache(), len(tokens) - 1)])
    assert model.captured is not None
    cache, count = draft.make_cache(), len(tokens) - 1
    layout = draft.layout([(0, count)], range(count))
    output = draft(draft.embed(mx.array([tokens[1:]])), draft.fuse(model.captured.array()), [cache], layout, [1])
    found: list[int] = []
    for at in range(length):
        token = draft.to_token_ids(mx.argmax(draft.logits(output)[0], axis=-1))
        found.append(cast(int, token.item()))
        output = draft(draft.embed(token[None]), output, [cache], draft.layout([(count + at, 1)], [count + at]))
    return tuple(found)


REQUESTS = [
    Request(make_prompt(40, 1), max_tokens=30),
    Request(make_prompt(150, 2), max_tokens=100),
    Request(make_prompt(20, 3), max_tokens=2),
    Request(make_prompt(3, 5), max_tokens=40),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{}, {"draft_vocab_size": 100, "norm_output": None, "fc_norm": None}],
)
def test_drafts_are_those_of_the_whole_text(
    model: Model, tmp_path: Path, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "DraftPlanner", RandomPlanner)
    draft = make_draft(tmp_path / "draft", model, **fields)
    drafter = RecordingDrafter(draft)
    engine = Engine(model, prefill_chunk=16, speculate=4, draft_model=draft, drafters=[drafter])
    engine.measure_steps()
    answers = answer(engine, REQUESTS)
    follow_up = replace(REQUESTS[0], prompt=(*REQUESTS[0].prompt, *answers[0][0][:20], 5, 6, 7))
    more = answer(engine, [follow_up])  # on cached rows, without that of the last common token
    assert len(drafter.drafts) > 30
    model.capture(draft.captured_layers)
    num_cached = len(follow_up.prompt)
    for tokens, drafted in drafter.drafts[::5]:  # each of the others would cost another run of both models
        if tokens[:num_cached] != list(follow_up.prompt):
            assert drafted == reference(model, draft, tokens, len(drafted))
    model.capture(())
    assert answers == answer(Engine(model, prefill_chunk=16), REQUESTS)
    assert more == answer(Engine(model, prefill_chunk=16), [follow_up])


SAMPLED = [
    Request(make_prompt(33, 4), max_tokens=25, sampling=Sampling(temperature=1.0, seed=3)),
    Request(make_prompt(3, 5), max_tokens=40, sampling=Sampling(temperature=2.0, top_k=20, seed=5)),
    Request(
        make_prompt(9, 6),
        max_tokens=30,
        sampling=Sampling(temperature=2.0, seed=8),
        logit_bias=tuple((token, 20.0) for token in range(4)),  # both models choose among these
        top_logprobs=2,
    ),
]


@pytest.mark.slow
def test_sampled_text_is_that_without_drafts(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "DraftPlanner", RandomPlanner)
    draft = make_draft(tmp_path / "draft", model)
    engine = Engine(model, prefill_chunk=16, speculate=4, draft_model=draft)
    found = answer(engine, SAMPLED)
    assert engine.drafts is not None
    assert engine.drafts.num_drafted > 20
    assert engine.drafts.num_accepted > 2  # by the random numbers alone
    model.capture(())
    expected: Answers = answer(Engine(model, prefill_chunk=16), SAMPLED)
    assert found == expected


@pytest.mark.sweep
def test_sampled_tokens_have_the_distribution_of_the_model(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "DraftPlanner", RandomPlanner)
    prompt, temperature, ids = make_prompt(9, 6), 2.0, (3, 50, 120)
    bias = tuple((token, 30.0) for token in ids)
    draft = make_draft(tmp_path / "draft", model)
    engine = Engine(model, speculate=3, draft_model=draft)
    num_texts = 1000
    counts: Counter[tuple[int, ...]] = Counter()
    for first in range(0, num_texts, 20):
        requests = [
            Request(prompt, max_tokens=3, sampling=Sampling(temperature, seed=first + index), logit_bias=bias)
            for index in range(20)
        ]
        counts.update(tuple(tokens) for tokens, _ in answer(engine, requests, at_once=20).values())
    assert engine.drafts is not None
    assert engine.drafts.num_accepted > 100
    model.capture(())
    expected = {
        text: num_texts
        * np.prod([_probability(model, prompt + text[:at], text[at], ids, temperature) for at in range(3)])
        for text in itertools.product(ids, repeat=3)
    }
    assert sum(counts[text] for text in expected) == num_texts
    chi_square = sum((counts[text] - count) ** 2 / count for text, count in expected.items())
    assert chi_square < 54.05  # 0.1 % of samples of 27 outcomes are larger


def _probability(model: Model, tokens: tuple[int, ...], token: int, ids: Sequence[int], temperature: float) -> float:
    """Return the probability of one of some equally biased tokens."""
    scaled = np.array(model(mx.array([tokens]))[0, -1], np.float64)[list(ids)] / temperature
    weights = np.exp(scaled - scaled.max())
    return float(weights[list(ids).index(token)] / weights.sum())


@pytest.mark.slow
def test_rows_of_blocks_from_the_disk_are_missing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "DraftPlanner", RandomPlanner)
    request = Request(make_prompt(2 * BLOCK_TOKENS + 30, 7), max_tokens=20)
    (expected,) = answer(Engine(model), [request]).values()
    draft = make_draft(tmp_path / "draft", model)
    for attempt in range(2):
        store = BlockStore(tmp_path / "cache", "key", "share", "stamp", shape_of(model), 10**9, warn=pytest.fail)
        engine = Engine(model, prefill_chunk=64, speculate=4, draft_model=draft, blocks=store)
        assert answer(engine, [request])[0] == expected
        assert engine.drafts is not None
        assert engine.drafts.num_drafted > 5
        (cache,) = engine._pool._idle
        assert cache.draft is not None
        assert cache.draft.positions[0] == (2 * BLOCK_TOKENS if attempt else 0)
        store.close()
    model.capture(())


def test_only_rows_of_common_tokens_are_kept(model: Model, tmp_path: Path) -> None:
    draft = make_draft(tmp_path / "draft", model)
    engine = Engine(model, prefill_chunk=16, speculate=4, draft_model=draft)
    answer(engine, [Request(make_prompt(80, 1), max_tokens=10)])
    prompt = (*make_prompt(80, 1)[:50], *make_prompt(20, 9))
    cache, cached = engine._pool.acquire(prompt)
    assert cached == 50
    assert cache.draft is not None
    assert cache.draft.positions == list(range(49))  # row 49 has read token 50
    assert cache.draft.rows.offset == 49
    assert np.isfinite(np.array(cache.draft.rows.fetch(49))).all()
