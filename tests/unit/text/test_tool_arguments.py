"""Grammars of tools' arguments: every schema has one, and it accepts all instances of the schema."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given

from kimi_mlx.engine.constraint import Constraint
from kimi_mlx.errors import EngineError, GrammarError
from kimi_mlx.runtime.grammars import open_grammar_compiler
from kimi_mlx.text import tool_arguments
from kimi_mlx.text.control_tokens import ControlTokens
from kimi_mlx.text.grammar import Thinking, build_grammar
from kimi_mlx.text.json_schema import check_schema, find_problem
from kimi_mlx.text.messages import ToolCall
from kimi_mlx.text.output import parse
from kimi_mlx.text.schema_bounds import check_value
from kimi_mlx.text.tokenizer import Tokenizer
from kimi_mlx.text.tool_arguments import ANY_ARGUMENTS, NO_ARGUMENTS, arguments_grammar
from tests.fakes import KIMI_MINI
from tests.schemas import ANY_OBJECT, random_answer, random_schema
from tests.tool_schemas import COUNT, KINDS, NOT_ENFORCED, arguments

TOKENIZER = Tokenizer.load(KIMI_MINI)
COMPILER = open_grammar_compiler(KIMI_MINI, TOKENIZER.vocab_size)
ALL = [pytest.param(schema, id=f"{kind}-{at}") for kind, schemas in KINDS.items() for at, schema in enumerate(schemas)]


def call_grammar(schema: Any, notes: list[str] | None = None) -> str:
    """Return the grammar of an answer that calls a tool with these arguments."""
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    grammar = build_grammar(
        TOKENIZER.special_tokens, Thinking.NONE, tools=[tool], tool_choice={"name": "f"}, notes=notes
    )
    assert grammar is not None
    return grammar


def accepts(schema: Any, text: str) -> bool:
    """Return whether the arguments of a call may be this text."""
    head = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    parts = ControlTokens(TOKENIZER.special_tokens).split(f"{head}{text}<|tool_call_end|>")
    constraint = Constraint(COMPILER, call_grammar(schema))
    try:
        for part in parts:
            for token in [part] if isinstance(part, int) else TOKENIZER.encode(part):
                constraint.advance(token)
    except EngineError:
        return False
    return True


def random_arguments(schema: Any, seed: int) -> Any:
    """Return arguments sampled from the masks alone; None if they do not end in time."""
    answer = random_answer(COMPILER, TOKENIZER, call_grammar(schema), seed)
    if answer is None:
        return None
    (call,) = parse(TOKENIZER, answer).tool_calls
    assert isinstance(call, ToolCall)
    return json.loads(call.arguments)


@pytest.mark.parametrize("schema", ALL)
def test_arguments_of_every_kind_of_schema_are_valid(schema: Any) -> None:
    assert arguments_grammar(schema)[1] == ()
    is_draft_4 = '"exclusiveMinimum": true' in json.dumps(schema)
    validator = (jsonschema.Draft4Validator if is_draft_4 else jsonschema.Draft202012Validator)(schema)
    found = [value for seed in range(2) if (value := random_arguments(schema, seed)) is not None]
    assert found
    for value in found:
        validator.validate(value)


@pytest.mark.parametrize("path", NOT_ENFORCED)
def test_unsupported_keywords_are_noted_and_the_others_enforced(path: str) -> None:
    schema = NOT_ENFORCED[path]
    grammar, problems = arguments_grammar(schema)
    assert [place for place, _ in problems] == [path]
    assert grammar != ANY_ARGUMENTS
    assert not accepts(schema, '{"other": "x"}')
    notes: list[str] = []
    call_grammar(schema, notes)
    assert [note.partition(" is not enforced: ")[0] for note in notes] == [f"`tools[0].function.parameters{path}`"]


OPTIONAL = {"type": "object", "properties": {"a": COUNT, "b": COUNT, "c": COUNT, "d": COUNT}, "required": ["c"]}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (OPTIONAL, ['{"c": 1, "d": 2, "a": 3}', '{"c": 1, "x": null, "b": 2}'], ['{"a": 1}', '{"c": 1, "a": "x"}']),
        (
            {**OPTIONAL, "additionalProperties": False},
            ['{"c": 1, "b": 2, "a": 3}', '{"c":1}'],
            ['{"c": 1, "x": 2}', '{"b": 1, "c": 2}', "{}"],
        ),
        (arguments(a={**OPTIONAL, "required": []}), ['{"a": {"d": 1, "a": 2}}', '{"a": {}}'], ['{"a": {"d": true}}']),
        (None, ["{}"], ['{"a": 1}']),
        ({}, ["{}", '{"a": [1]}'], ["[]", "1"]),
        ({"type": "array"}, ["{}"], ["[]"]),
        ({"type": ["null", "object"]}, ["{}"], ["null"]),
        ({"$ref": "#/$defs/a", "$defs": {"a": arguments(b=COUNT)}}, ['{"b": 1}'], ["{}"]),
        (
            {"dependencies": {"a": ["b"]}, "type": "object", "properties": {"a": COUNT, "b": COUNT}},
            ["{}"],
            ['{"a": 1}'],
        ),
        ({"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}, ['{"b": 1}'], ['{"a": 1}']),
    ],
)
def test_accepted_and_rejected_arguments(schema: Any, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not accepts(schema, text)] == []
    assert [text for text in bad if accepts(schema, text)] == []


def test_a_tool_without_a_schema_takes_no_arguments() -> None:
    assert arguments_grammar(None) == (NO_ARGUMENTS, ())


@given(schema=ANY_OBJECT)
def test_any_json_is_a_schema_of_arguments(schema: dict[str, Any]) -> None:
    try:
        check_value(schema, "here")
    except GrammarError:
        return
    assert find_problem(arguments_grammar(schema)[0]) is None


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.sweep)])
def test_random_schemas_are_enforced_as_those_of_answers(count: int) -> None:
    rng = random.Random(count)
    for seed in range(count):
        schema = random_schema(rng)
        if not isinstance(schema, dict) or schema.get("type") != "object":
            schema = arguments(a=schema)
        _, problems = arguments_grammar(schema)
        try:
            check_schema(schema, "here", locates_problem=False)
        except GrammarError:
            assert problems
        else:
            assert not problems
        if not problems and (value := random_arguments(schema, seed)) is not None:
            jsonschema.Draft202012Validator(schema).validate(value)


def nested(depth: int, keyword: str, width: int = 2) -> Any:
    schema: Any = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(a+)+$"}}}
    for level in range(depth):
        schema = {keyword: [{**schema, "title": f"{level}.{at}", "maxProperties": at + 1} for at in range(width)]}
    return schema


HOSTILE: dict[str, Any] = {
    "combinations of combinations": nested(10, "anyOf"),
    "all of all": nested(6, "allOf", 3),
    "references to references": {
        "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)} | {"d30": COUNT},
        **arguments(a={"$ref": "#/$defs/d0"}),
    },
    "a reference to itself": {"$defs": {"a": {"$ref": "#/$defs/a"}}, **arguments(a={"$ref": "#/$defs/a"})},
    "a long repetition": arguments(a={"type": "string", "pattern": "^(([a-z]{1,1000}){1,1000}){1,1000}$"}),
    "alternatives": arguments(
        a={"type": "string", "pattern": "^(" + "|".join(f"(a{{0,{i}}}b)*" for i in range(200)) + ")$"}
    ),
    "many properties": {
        "type": "object",
        "properties": {f"p{i}": COUNT for i in range(3000)},
        "additionalProperties": False,
    },
    "many patterns": {"type": "object", "patternProperties": {f"^.*{i}.*$": COUNT for i in range(100)}},
    "a large enum": arguments(a={"enum": [f"value {i}" for i in range(10_000)]}),
    "a long list": arguments(a={"type": "array", "items": COUNT, "minItems": 10**9}),
    "a large divisor": arguments(a={"type": "integer", "multipleOf": 10**9 + 7}),
    "depth": json.loads('{"items":' * 70 + "{}" + "}" * 70),
    "many cases": {**OPTIONAL, "dependentRequired": {f"p{i}": [f"p{i + 1}"] for i in range(500)}},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "all of all" else ()) for name in HOSTILE]
)
def test_hostile_schemas_are_bounded(name: str) -> None:
    check_value(HOSTILE[name], "here")
    began = time.process_time()
    grammar, _ = arguments_grammar(HOSTILE[name])
    assert find_problem(grammar) is None
    assert time.process_time() - began < 8


def test_few_of_many_problems_are_noted() -> None:
    notes: list[str] = []
    call_grammar({"properties": {f"p{i}": {"type": "float"} for i in range(20)}}, notes)
    assert len(notes) == 9
    assert notes[-1] == "`tools[0].function.parameters`: 12 more keywords are not enforced"


def test_a_schema_that_takes_long_is_not_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_arguments, "MAX_COMPILE_S", -1)
    notes: list[str] = []
    call_grammar(arguments(slow=COUNT), notes)
    assert notes == ["`tools[0].function.parameters` is not enforced: it is too complex to enforce in time"]
