"""Constrained decoding: masks, drafts, ends, and the validity of every answer that a grammar allows."""

from __future__ import annotations

import json
import random
from typing import Any, cast

import jsonschema
import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.engine.constraint import Constraint, TokenVocabulary, masked
from kimi_mlx.errors import EngineError, GrammarError
from kimi_mlx.model.decoder import Model
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.runtime.grammars import load_token_vocabulary
from kimi_mlx.runtime.load import load
from kimi_mlx.text.grammar import Thinking, build_grammar, detect_thinking
from kimi_mlx.text.tokenizer import Tokenizer
from tests.fakes import KIMI_MINI
from tests.schemas import random_answer, random_schema

TOKENIZER = Tokenizer.load(KIMI_MINI)
EXTRA = 40
"""Size of the logits: larger than the tokenizer's vocabulary."""
SIZE = TOKENIZER.vocab_size + EXTRA
VOCABULARY = load_token_vocabulary(KIMI_MINI, SIZE)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def grammar_for(schema: Any, thinking: Thinking = Thinking.NONE) -> str:
    grammar = build_grammar(TOKENIZER.special_tokens, thinking, response_schema=schema)
    assert grammar is not None
    return grammar


def bits(mask: np.ndarray) -> np.ndarray:
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:SIZE].astype(bool)


def random_grammar(rng: random.Random) -> tuple[Any, str]:
    """Return the next random schema that is accepted."""
    while True:
        schema = random_schema(rng)
        try:
            return schema, grammar_for(schema)
        except GrammarError:
            pass


def test_draft_masks_equal_masks_after_advancing() -> None:
    for seed in range(20):
        _, grammar = random_grammar(random.Random(seed))
        answer = random_answer(VOCABULARY, TOKENIZER, grammar, seed, max_tokens=100)
        if answer is None:
            continue
        one, other = Constraint(VOCABULARY, grammar), Constraint(load_token_vocabulary(KIMI_MINI, SIZE), grammar)
        at = len(answer) // 3
        for token in answer[:at]:
            assert (one.allowed() == other.allowed()).all()
            one.advance(token)
            other.advance(token)
        before = one.allowed()
        along = one.allowed_for_draft(answer[at:-1])
        assert (one.allowed() == before).all()
        for i, token in enumerate(answer[at:]):
            assert (along[i] == other.allowed()).all()
            assert (one.allowed() == other.allowed()).all()
            one.advance(token)
            other.advance(token)
        assert one.is_finished
        assert other.is_finished


def test_masks_after_a_rejected_or_end_token_allow_everything() -> None:
    constraint = Constraint(VOCABULARY, grammar_for(PERSON))
    (brace,) = TOKENIZER.encode("{")
    end = TOKENIZER.special_tokens["<|im_end|>"]
    masks = constraint.allowed_for_draft([brace, end, brace])
    assert (masks[0] == constraint.allowed()).all()
    assert not bits(masks[1])[end]
    assert bits(masks[2]).all()
    assert bits(masks[3]).all()


def test_complete_answer_allows_only_end_tokens() -> None:
    constraint = Constraint(VOCABULARY, grammar_for(PERSON))
    for token in TOKENIZER.encode('{"name": "Ada", "age": 36}'):
        assert bits(constraint.allowed())[token]
        constraint.advance(token)
    assert not constraint.is_finished
    assert set(np.flatnonzero(bits(constraint.allowed()))) == TOKENIZER.eos_token_ids
    constraint.advance(min(TOKENIZER.eos_token_ids))
    assert constraint.is_finished


@pytest.mark.parametrize("token", [0, TOKENIZER.special_tokens["<|im_end|>"], TOKENIZER.vocab_size + 1, SIZE + 7])
def test_forbidden_tokens_are_rejected(token: int) -> None:
    constraint = Constraint(VOCABULARY, grammar_for({"const": "x"}))
    with pytest.raises(EngineError, match="the grammar does not allow"):
        constraint.advance(token)


def test_free_text_allows_every_character_but_no_control_token() -> None:
    grammar = grammar_for(PERSON, Thinking.OPEN)
    allowed = bits(Constraint(VOCABULARY, grammar).allowed())
    special = set(TOKENIZER.special_tokens.values())
    assert {int(i) for i in np.flatnonzero(allowed)} & special == {TOKENIZER.special_tokens["</think>"]}
    assert not allowed[TOKENIZER.vocab_size :].any()
    constraint = Constraint(VOCABULARY, grammar)
    for token in TOKENIZER.encode("</think> 名前 👍🏽\n\t<|im_end|>\x00"):
        constraint.advance(token)


def test_invalid_grammar_raises_engine_error() -> None:
    with pytest.raises(EngineError, match="cannot be compiled"):
        Constraint(VOCABULARY, "start: nothing")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_masked_logits(dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(0)
    logits = mx.array(rng.normal(size=(3, SIZE))).astype(dtype)
    masks = rng.integers(0, 2**32, size=(3, VOCABULARY.num_words), dtype=np.uint32)
    out = masked(logits, mx.array(masks))
    assert out.dtype == dtype
    expected = np.where(np.stack([bits(row) for row in masks]), np.array(logits.astype(mx.float32)), -np.inf)
    assert (np.array(out.astype(mx.float32)) == expected).all()


def check_valid(schema: Any, text: str) -> None:
    """Check an answer with the `jsonschema` package."""
    jsonschema.Draft202012Validator({"type": "object"} if schema is True else schema).validate(json.loads(text))


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.sweep)])
def test_every_answer_to_a_random_schema_is_valid(count: int) -> None:
    rng = random.Random(count)
    unfinished = 0
    for seed in range(count):
        schema, grammar = random_grammar(rng)
        answer = random_answer(VOCABULARY, TOKENIZER, grammar, seed)
        if answer is None:
            unfinished += 1
        else:
            check_valid(schema, TOKENIZER.decode(answer[:-1]))
    assert unfinished < count / 20


@pytest.fixture(scope="module")
def mini() -> tuple[Model, ChatTokenizer]:
    return load("kimi-mini")


@pytest.mark.parametrize("thinking", [True, False])
def test_kimi_mini_follows_the_grammar(mini: tuple[Model, ChatTokenizer], thinking: bool) -> None:
    model, tokenizer = mini
    vocabulary = load_token_vocabulary(KIMI_MINI, model.config.vocab_size)
    finished = 0
    rng = random.Random(7)
    for schema in [PERSON, *(random_grammar(rng)[0] for _ in range(5))]:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], thinking=thinking)
        how = detect_thinking(TOKENIZER.special_tokens, prompt)
        assert how is (Thinking.OPEN if thinking else Thinking.NONE)
        answer = greedy(model, vocabulary, prompt, grammar_for(schema, how))
        if answer[-1] in TOKENIZER.eos_token_ids:
            finished += 1
            check_valid(schema, TOKENIZER.decode(answer[:-1]).rpartition("</think>")[2])
    assert finished


def greedy(model: Model, vocabulary: TokenVocabulary, prompt: list[int], grammar: str, most: int = 150) -> list[int]:
    """Return the most likely allowed tokens."""
    constraint, cache = Constraint(vocabulary, grammar), model.make_cache()
    answer: list[int] = []
    tokens = prompt
    while len(answer) < most and not constraint.is_finished:
        logits = model(mx.array([tokens]), cache=cache)[:, -1]
        token = cast(int, mx.argmax(masked(logits, mx.array(constraint.allowed()[None]))).item())
        constraint.advance(token)
        answer.append(token)
        tokens = [token]
    return answer
