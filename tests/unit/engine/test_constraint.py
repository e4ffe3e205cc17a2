"""Constrained decoding: masks, drafts, ends, and the validity of every answer that a grammar allows."""

from __future__ import annotations

import json
import random
import threading
from functools import partial
from typing import Any, cast

import jsonschema
import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.engine.constraint import Constraint, _LimitError
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Token
from kimi_mlx.engine.grammar_compiler import GrammarCompiler
from kimi_mlx.engine.request import Request
from kimi_mlx.engine.token_mask import masked
from kimi_mlx.errors import EngineError, GrammarError
from kimi_mlx.model.decoder import Model
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.runtime.grammars import open_grammar_compiler
from kimi_mlx.runtime.load import load
from kimi_mlx.text.control_tokens import ControlTokens
from kimi_mlx.text.grammar import Thinking, build_grammar, detect_thinking
from kimi_mlx.text.messages import ToolCall
from kimi_mlx.text.output import parse
from kimi_mlx.text.tokenizer import Tokenizer
from tests.fakes import KIMI_MINI
from tests.schemas import random_answer, random_schema

TOKENIZER = Tokenizer.load(KIMI_MINI)
EXTRA = 40
"""Size of the logits: larger than the tokenizer's vocabulary."""
SIZE = TOKENIZER.vocab_size + EXTRA
COMPILER = open_grammar_compiler(KIMI_MINI, SIZE)
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
        answer = random_answer(COMPILER, TOKENIZER, grammar, seed, max_tokens=100)
        if answer is None:
            continue
        one, other = Constraint(COMPILER, grammar), Constraint(open_grammar_compiler(KIMI_MINI, SIZE), grammar)
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


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tools(count: int) -> list[dict[str, Any]]:
    """Return strict tools whose names are prefixes of each other."""
    names = [f"get{'_more' * (i % 3)}_{i}" for i in range(count - 1)] + ["get"]
    return [{"type": "function", "function": {"name": name, "parameters": WEATHER, "strict": True}} for name in names]


def ids_of(text: str) -> list[int]:
    parts = ControlTokens(TOKENIZER.special_tokens).split(text)
    return [id for part in parts for id in ([part] if isinstance(part, int) else TOKENIZER.encode(part))]


def test_draft_masks_across_calls_equal_masks_after_advancing() -> None:
    grammar = build_grammar(TOKENIZER.special_tokens, Thinking.NONE, tools=tools(20))
    assert grammar is not None
    calls = "".join(
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>"
        '{"city": "Paris", "days": 3}<|tool_call_end|>'
        for index, name in enumerate(["get", "get_more_1", "get"])
    )
    answer = ids_of(f"So:<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|><|im_end|>")
    other = Constraint(COMPILER, grammar)
    expected = [other.allowed()]
    for token in answer:
        assert bits(expected[-1])[token]
        other.advance(token)
        expected.append(other.allowed())
    assert other.is_free()
    for length in (1, 5, 16):
        constraint = Constraint(COMPILER, grammar)
        for at, token in enumerate(answer):
            masks = constraint.allowed_for_draft(answer[at:-1][:length])
            assert all((mask == expected[at + i]).all() for i, mask in enumerate(masks))
            constraint.advance(token)
        assert constraint.is_free()


def test_an_answer_cannot_end_inside_arguments() -> None:
    grammar = build_grammar(TOKENIZER.special_tokens, Thinking.NONE, tools=tools(2), tool_choice="required")
    assert grammar is not None
    constraint = Constraint(COMPILER, grammar)
    head = "<|tool_calls_section_begin|><|tool_call_begin|>functions.get:0<|tool_call_argument_begin|>"
    for token in ids_of(head + '{"city": "Paris", "days": 3}'):
        constraint.advance(token)
    allowed = {int(i) for i in np.flatnonzero(bits(constraint.allowed()))}
    assert TOKENIZER.special_tokens["<|tool_call_end|>"] in allowed
    assert not allowed & TOKENIZER.eos_token_ids
    with pytest.raises(EngineError, match="does not allow"):
        constraint.advance(min(TOKENIZER.eos_token_ids))


def test_many_tools_compile_each_on_its_own_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = open_grammar_compiler(KIMI_MINI, SIZE)
    compiled: list[str] = []
    compile = compiler.vocabulary.compile
    monkeypatch.setattr(compiler.vocabulary, "compile", lambda grammar: compiled.append(grammar) or compile(grammar))
    for first_index in (0, 3):  # two turns of a conversation
        grammar = build_grammar(
            TOKENIZER.special_tokens, Thinking.NONE, tools=tools(300), tool_choice="required", first_index=first_index
        )
        assert grammar is not None
        constraint = Constraint(compiler, grammar)
        constraint.start_compiling()
        for token in ids_of("<|tool_calls_section_begin|><|tool_call_begin|>functions.get"):
            constraint.advance(token)
        constraint.advance(ids_of("_")[0])
        for token in ids_of("3:" + str(first_index) + "<|tool_call_argument_begin|>"):
            constraint.advance(token)
    assert len(compiled) == 1  # all arguments are alike


def text_of_call(arguments: str) -> str:
    return f"<|tool_call_begin|>functions.get:0<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def test_arguments_whose_grammar_fails_may_be_any_object() -> None:
    answer = ids_of(text_of_call('{"x": [1]}'))
    text = build_grammar(TOKENIZER.special_tokens, Thinking.NONE, tools=tools(1))
    assert text is not None
    rules = json.loads(text)
    rules["arguments"] = {"functions.get": "start: nothing"}
    constraint = Constraint(COMPILER, json.dumps(rules))
    for token in answer:
        assert bits(constraint.allowed())[token]
        constraint.advance(token)
    for at in (10, len(answer) - 4):  # in the id, and in the arguments
        constraint = Constraint(COMPILER, text)
        limit = _LimitError(json.loads(text)["arguments"]["functions.get"], EngineError("too complex"))
        good = ids_of(text_of_call('{"city": "Paris", "days": 3}'))
        for token in good[:at]:
            constraint.advance(token)
        constraint._fall_back(limit)
        for token in [*good[at:], TOKENIZER.special_tokens["<|tool_calls_section_end|>"]]:
            constraint.advance(token)
        assert constraint.is_free()


def test_text_around_calls_needs_no_masks() -> None:
    text = build_grammar(TOKENIZER.special_tokens, Thinking.OPEN, tools=tools(3))
    assert text is not None
    unread = GrammarCompiler(lambda: pytest.fail("the vocabulary is read"))
    constraint = Constraint(unread, text)
    for token in ids_of("Well.</think> Text.<|im_end|>"):
        assert constraint.is_free([token])
        constraint.advance(token)
    assert not constraint.is_free(ids_of("So:<|tool_calls_section_begin|>"))
    assert constraint.num_allowed(ids_of("So: <think>")) == len(ids_of("So: <think>"))


def test_running_answers_do_not_wait_for_a_grammar(mini: tuple[Model, ChatTokenizer]) -> None:
    model, tokenizer = mini
    compiler = open_grammar_compiler(KIMI_MINI, model.config.vocab_size)
    compile, may_compile = compiler.vocabulary.compile, threading.Event()
    compiler.vocabulary.compile = lambda grammar: may_compile.wait(30) and compile(grammar)  # pyright: ignore
    prompt = tuple(tokenizer.encode("Name a colour."))
    engine = Engine(model, constrain=partial(Constraint, compiler))
    engine.add(0, Request(prompt, max_tokens=60))
    list(engine.step())
    engine.add(1, Request(prompt, max_tokens=5, grammar=grammar_for({"enum": ["red", "green"]})))
    seen: list[int] = []
    while not engine.is_idle:
        seen += [request_id for request_id, event in engine.step() if isinstance(event, Token)]
        if seen.count(0) == 20:
            assert seen.count(1) == 0
            may_compile.set()
    assert seen.count(0) == 60
    assert seen.count(1) == 5


def test_masks_after_a_rejected_or_end_token_allow_everything() -> None:
    constraint = Constraint(COMPILER, grammar_for(PERSON))
    (brace,) = TOKENIZER.encode("{")
    end = TOKENIZER.special_tokens["<|im_end|>"]
    masks = constraint.allowed_for_draft([brace, end, brace])
    assert (masks[0] == constraint.allowed()).all()
    assert not bits(masks[1])[end]
    assert bits(masks[2]).all()
    assert bits(masks[3]).all()


def test_complete_answer_allows_only_end_tokens() -> None:
    constraint = Constraint(COMPILER, grammar_for(PERSON))
    for token in TOKENIZER.encode('{"name": "Ada", "age": 36}'):
        assert bits(constraint.allowed())[token]
        constraint.advance(token)
    assert not constraint.is_finished
    assert set(np.flatnonzero(bits(constraint.allowed()))) == TOKENIZER.eos_token_ids
    constraint.advance(min(TOKENIZER.eos_token_ids))
    assert constraint.is_finished


@pytest.mark.parametrize("token", [0, TOKENIZER.special_tokens["<|im_end|>"], TOKENIZER.vocab_size + 1, SIZE + 7])
def test_forbidden_tokens_are_rejected(token: int) -> None:
    constraint = Constraint(COMPILER, grammar_for({"const": "x"}))
    with pytest.raises(EngineError, match="the grammar does not allow"):
        constraint.advance(token)


def test_free_text_allows_every_character_but_no_control_token() -> None:
    grammar = grammar_for(PERSON, Thinking.OPEN)
    allowed = bits(Constraint(COMPILER, grammar).allowed())
    special = set(TOKENIZER.special_tokens.values())
    assert {int(i) for i in np.flatnonzero(allowed)} & special == {TOKENIZER.special_tokens["</think>"]}
    assert not allowed[TOKENIZER.vocab_size :].any()
    constraint = Constraint(COMPILER, grammar)
    for token in TOKENIZER.encode("</think> 名前 👍🏽\n\t<|im_end|>\x00"):
        constraint.advance(token)


def test_invalid_grammar_raises_engine_error() -> None:
    with pytest.raises(EngineError, match="cannot be compiled"):
        Constraint(COMPILER, json.dumps({"answer": "start: nothing"})).allowed()
    with pytest.raises(EngineError, match="cannot be compiled"):
        Constraint(COMPILER, "start: nothing")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_masked_logits(dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(0)
    logits = mx.array(rng.normal(size=(3, SIZE))).astype(dtype)
    masks = rng.integers(0, 2**32, size=(3, COMPILER.vocabulary.num_words), dtype=np.uint32)
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
        answer = random_answer(COMPILER, TOKENIZER, grammar, seed)
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
    compiler = open_grammar_compiler(KIMI_MINI, model.config.vocab_size)
    finished = 0
    rng = random.Random(7)
    for schema in [PERSON, *(random_grammar(rng)[0] for _ in range(5))]:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], thinking=thinking)
        how = detect_thinking(TOKENIZER.special_tokens, prompt)
        assert how is (Thinking.OPEN if thinking else Thinking.NONE)
        answer = greedy(model, compiler, prompt, grammar_for(schema, how))
        if answer[-1] in TOKENIZER.eos_token_ids:
            finished += 1
            check_valid(schema, TOKENIZER.decode(answer[:-1]).rpartition("</think>")[2])
    assert finished


def greedy(model: Model, compiler: GrammarCompiler, prompt: list[int], grammar: str, most: int = 150) -> list[int]:
    """Return the most likely allowed tokens."""
    constraint, cache = Constraint(compiler, grammar), model.make_cache()
    answer: list[int] = []
    tokens = prompt
    while len(answer) < most and not constraint.is_finished:
        logits = model(mx.array([tokens]), cache=cache)[:, -1]
        token = cast(int, mx.argmax(masked(logits, mx.array(constraint.allowed()[None]))).item())
        constraint.advance(token)
        answer.append(token)
        tokens = [token]
    return answer


ENDLESS = {
    "type": "object",
    "properties": {"rows": {"type": "array", "items": WEATHER}, "note": {"type": "string"}, "n": {"type": "number"}},
    "required": ["rows", "note", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("thinking", [Thinking.OPEN, Thinking.NONE])
@pytest.mark.parametrize("max_tokens", [90, 200])
def test_a_required_call_is_complete_before_the_maximum_number_of_tokens(thinking: Thinking, max_tokens: int) -> None:
    tool = {"type": "function", "function": {"name": "get", "parameters": ENDLESS}}
    text = build_grammar(TOKENIZER.special_tokens, thinking, tools=[tool], tool_choice="required")
    assert text is not None
    rng = np.random.default_rng(max_tokens)
    constraint, ahead = Constraint(COMPILER, text), Constraint(COMPILER, text)
    for either in (constraint, ahead):
        either.limit_tokens(max_tokens)
    answer: list[int] = []
    while not constraint.is_finished and len(answer) < max_tokens:
        allowed = np.flatnonzero(bits(constraint.allowed()))
        answer.append(int(rng.choice(allowed)))
        constraint.advance(answer[-1])
    assert constraint.is_finished
    assert constraint.was_shortened
    masks = ahead.allowed_for_draft(answer[:-1])
    for at, token in enumerate(answer):
        assert (masks[at] == ahead.allowed()).all()
        ahead.advance(token)
    (call,) = parse(TOKENIZER, answer, thinking is Thinking.OPEN).tool_calls
    assert isinstance(call, ToolCall)
    jsonschema.validate(json.loads(call.arguments), ENDLESS)


def test_a_short_call_is_not_shortened() -> None:
    text = build_grammar(TOKENIZER.special_tokens, Thinking.NONE, tools=tools(1), tool_choice="required")
    assert text is not None
    arguments = '{"city": "Paris", "days": 3}'
    answer = ids_of(f"<|tool_calls_section_begin|>{text_of_call(arguments)}<|tool_calls_section_end|><|im_end|>")
    constraint = Constraint(COMPILER, text)
    constraint.limit_tokens(2 * len(answer))
    for token in answer:
        constraint.advance(token)
    assert constraint.is_finished
    assert not constraint.was_shortened
