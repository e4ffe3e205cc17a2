"""Grammars of answers: the answers they accept, token by token, in kimi-mini's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from kimi_mlx.engine.constraint import Constraint
from kimi_mlx.errors import EngineError, GrammarError
from kimi_mlx.runtime.grammars import open_grammar_compiler
from kimi_mlx.text.control_tokens import ControlTokens
from kimi_mlx.text.grammar import MAX_CALLS, Thinking, build_grammar, detect_thinking
from kimi_mlx.text.messages import ToolCall
from kimi_mlx.text.output import parse
from kimi_mlx.text.tokenizer import Tokenizer
from tests.fakes import KIMI_MINI

TOKENIZER = Tokenizer.load(KIMI_MINI)
COMPILER = open_grammar_compiler(KIMI_MINI, TOKENIZER.vocab_size)
SPECIAL = TOKENIZER.special_tokens
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ODD = {"type": "object", "properties": {"a": {"not": {}}}}


def tool(name: str, parameters: Any = CITY, strict: bool = False) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


def grammar(thinking: Thinking = Thinking.NONE, **arguments: Any) -> str:
    text = build_grammar(SPECIAL, thinking, **arguments)
    assert text is not None
    return text


def call(name: str, index: int, arguments: str) -> str:
    return f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def section(*calls: str) -> str:
    return f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"


def ids_of(text: str) -> list[int]:
    ids: list[int] = []
    for part in ControlTokens(SPECIAL).split(text):
        ids += [part] if isinstance(part, int) else TOKENIZER.encode(part)
    return ids


def accepts(grammar: str, text: str) -> bool:
    """Return whether a grammar accepts an answer."""
    constraint = Constraint(COMPILER, grammar)
    try:
        for token in ids_of(text + "<|im_end|>"):
            constraint.advance(token)
    except EngineError:
        return False
    return constraint.is_finished or constraint.is_free()


PARIS = '{"city": "Paris"}'


@pytest.mark.parametrize(
    ("arguments", "good", "bad"),
    [
        ({"response_schema": CITY}, [PARIS, '{\n  "city":"é"\n}'], ["", " " + PARIS, PARIS + " ", "{}", "Paris"]),
        ({"response_schema": True}, ["{}", '{"a": [1, null]}'], ["[]", "1", "{} {}", '{"a": ' + " " * 65 + "1}"]),
        (
            {"response_schema": CITY, "thinking": Thinking.OPEN},
            ["Well.</think>" + PARIS, "</think>" + PARIS],
            [PARIS, "<think></think>" + PARIS, "a</think>b" + PARIS, "a</think></think>" + PARIS],
        ),
        (
            {"response_schema": CITY, "thinking": Thinking.POSSIBLE},
            ["<think>Well.</think>" + PARIS, PARIS],
            ["Well.</think>" + PARIS, "<think>" + PARIS],
        ),
        (
            {"tools": [tool("f", strict=True), tool("g", ODD)]},
            [
                "",
                "Text.",
                "Text." + section(call("f", 0, PARIS)),
                section(call("g", 0, '{"a": 1}'), call("f", 1, PARIS)),
            ],
            [
                section(),
                section(call("f", 0, "{}")),
                section(call("f", 1, PARIS)),
                section(call("f", 0, PARIS), call("f", 0, PARIS)),
                section(call("h", 0, PARIS)),
                section(call("g", 0, "[1]")),
                section(call("g", 0, '{"a": 1}'), call("f", 2, PARIS)),
                call("f", 0, "{}"),
            ],
        ),
        (
            {"tools": [tool("f"), tool("g", ODD), tool("a name?")], "thinking": Thinking.OPEN},
            [
                "<think></think></think>" + section(call("f", 0, PARIS)) + "Text.",
                "Thought." + section(call("a name?", 0, PARIS)) + section(call("g", 1, '{"a": 1}')),
                call("f", 0, PARIS) + "<|tool_calls_section_end|>",
            ],
            [
                section(call("f", 0, '{"city": 1}')),
                section(call("a name", 0, PARIS)),
                section(call("f", 0, PARIS)) + section(call("g", 0, "{}")),
                "<|tool_calls_section_begin|>Text.",
                "<|tool_call_begin|>f:0<|tool_call_argument_begin|>" + PARIS + "<|tool_call_end|>",
            ],
        ),
        (
            {"tools": [tool("f", strict=True), tool("g")], "constrains_arguments": False},
            [section(call("g", 0, '{"city": 1}'), call("f", 1, PARIS))],
            [section(call("f", 0, '{"city": 1}')), section(call("g", 0, "[1]"))],
        ),
        (
            {"tools": [tool("f"), tool("g")], "tool_choice": "required", "first_index": 7},
            [section(call("f", 7, PARIS)), section(call("g", 7, PARIS), call("f", 8, PARIS))],
            ["Text.", "", "Text." + section(call("f", 7, PARIS)), section(call("f", 0, PARIS))],
        ),
        (
            {"tools": [tool("f"), tool("g")], "tool_choice": {"name": "g"}, "thinking": Thinking.OPEN},
            ["So.</think>" + section(call("g", 0, PARIS))],
            [section(call("g", 0, PARIS)), "</think>" + section(call("f", 0, PARIS))],
        ),
        ({"tools": [tool("f")], "tool_choice": "none"}, ["Text."], [section(call("f", 0, PARIS))]),
        (
            {"tools": [tool("f")], "parallel_tool_calls": False},
            ["Text.", section(call("f", 0, PARIS))],
            [
                section(call("f", 0, PARIS), call("f", 1, PARIS)),
                section(call("f", 0, PARIS)) + section(call("f", 1, PARIS)),
                section(call("f", 0, '{"any": "object"}')),
            ],
        ),
        (
            {"tools": [tool("f")], "response_schema": CITY},
            [PARIS, section(call("f", 0, PARIS))],
            ["Text.", PARIS + section(call("f", 0, PARIS)), "Text." + section(call("f", 0, PARIS))],
        ),
        ({"tools": [tool("f", None)], "tool_choice": "required"}, [section(call("f", 0, "{}"))], ["{}"]),
        ({"tools": [tool("f", ODD)], "tool_choice": "required"}, [section(call("f", 0, '{"a": 1}'))], []),
    ],
)
def test_accepted_and_rejected_answers(arguments: dict[str, Any], good: list[str], bad: list[str]) -> None:
    text = grammar(**arguments)
    assert [answer for answer in good if not accepts(text, answer)] == []
    assert [answer for answer in bad if accepts(text, answer)] == []


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tools": [tool("f")], "constrains_arguments": False},
        {"tools": [tool("a name?", ODD)], "tool_choice": "auto", "constrains_arguments": False},
        {"tool_choice": "none", "parallel_tool_calls": False},
    ],
)
def test_without_constraints_there_is_no_grammar(arguments: dict[str, Any]) -> None:
    assert build_grammar(SPECIAL, Thinking.OPEN, **arguments) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"response_schema": {"not": {}}}, "`response_format: $.not`"),
        ({"tools": [tool("f"), tool(" ")]}, "`tools[1].function.name`: ` ` is not a name"),
        ({"tools": [{"type": "function"}]}, "`tools[0].function` is missing"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [tool("f")], "tool_choice": "any"}, "`tool_choice` is `any`"),
        ({"tools": [tool("f")], "tool_choice": {"name": "g"}}, "`tool_choice` names `g`"),
    ],
)
def test_unsupported_requests_are_refused_with_the_location(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(GrammarError) as caught:
        grammar(**arguments)
    assert message in str(caught.value)


def test_a_model_without_call_tokens_cannot_be_forced_to_call() -> None:
    with pytest.raises(GrammarError, match="has no `<|tool_calls_section_begin|>`".replace("|", r"\|")):
        build_grammar({}, Thinking.NONE, tools=[tool("f")], tool_choice="required")
    assert build_grammar({}, Thinking.NONE, tools=[tool("f")]) is None


def test_the_maximum_number_of_calls() -> None:
    text = grammar(tools=[tool("f")], tool_choice="required")
    answer = section(*(call("f", i, PARIS) for i in range(MAX_CALLS)))
    assert accepts(text, answer)
    assert not accepts(text, section(*(call("f", i, PARIS) for i in range(MAX_CALLS + 1))))
    calls = parse(TOKENIZER, ids_of(answer)).tool_calls
    arguments = [json.loads(call.arguments) for call in calls if isinstance(call, ToolCall)]
    assert arguments == [{"city": "Paris"}] * MAX_CALLS


@pytest.mark.parametrize(
    ("special", "prompt", "thinking"),
    [
        (SPECIAL, [5, SPECIAL["<think>"]], Thinking.OPEN),
        (SPECIAL, [5, SPECIAL["</think>"]], Thinking.NONE),
        (SPECIAL, [5, SPECIAL["<|im_middle|>"]], Thinking.POSSIBLE),
        ({"<|im_middle|>": 5}, [5], Thinking.NONE),
    ],
)
def test_detect_thinking(special: Mapping[str, int], prompt: list[int], thinking: Thinking) -> None:
    assert detect_thinking(special, prompt) is thinking
