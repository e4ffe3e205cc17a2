"""Build the grammar of an answer that must match a JSON schema or a choice of tools.

    answer:  reasoning? (JSON | text? section?)         then an end token, which is not part of the grammar
    section: section-begin call+ section-end
    call:    call-begin functions.NAME:INDEX argument-begin JSON call-end

The result is JSON, which kimi_mlx.engine.constraint reads:

    answer       grammar of the answer in llguidance's dialect of Lark, with control tokens by id; calls are without
                 their arguments
    arguments    grammar of each tool's arguments, by `functions.NAME`
    call_tokens  ids of call-begin, argument-begin and call-end

The arguments of each tool are a grammar of their own, because the time to compile one grammar of many tools grows with
the product of tools and calls. They are compiled once, and only those of called tools are used.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, cast

from kimi_mlx.errors import GrammarError
from kimi_mlx.text.json_schema import Schema, check_schema, find_problem, to_lark
from kimi_mlx.text.output import CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, THINK_BEGIN, THINK_END
from kimi_mlx.text.tool_calls import ARGUMENT_BEGIN, PREFIX

MAX_CALLS = 16
"""Maximum number of tool calls in an answer with a grammar."""
CHECK_S = 10.0
"""Time limit for checking the schemas of all tools, which usually takes milliseconds each."""
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
ANY_OBJECT: Schema = {"type": "object"}
NO_FORCING = '%llguidance {"no_forcing": true}'
"""Directive: llguidance does not tokenize forced text. The model chooses among the tokens that begin it."""
CHOICES = ("auto", "none", "required")

Ids = Mapping[str, int]
"""Control tokens: text -> id."""


class Thinking(Enum):
    """Whether an answer begins with reasoning."""

    OPEN = auto()
    """Yes: the prompt ends in `<think>`."""
    POSSIBLE = auto()
    """Perhaps: the model decides, and writes `<think>` itself."""
    NONE = auto()
    """No: the model does not think, or the prompt has closed the reasoning."""


def detect_thinking(special_tokens: Ids, prompt: Sequence[int]) -> Thinking:
    """Return whether the answer to a prompt begins with reasoning."""
    last = prompt[-1] if prompt else None
    if THINK_BEGIN not in special_tokens or last == special_tokens.get(THINK_END):
        return Thinking.NONE
    return Thinking.OPEN if last == special_tokens[THINK_BEGIN] else Thinking.POSSIBLE


def build_grammar(
    special_tokens: Ids,
    thinking: Thinking,
    response_schema: Mapping[str, Any] | bool | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: str | Mapping[str, Any] = "auto",
    parallel_tool_calls: bool = True,
    first_index: int = 0,
    schema_name: str = "response_format",
    response_rule: str | None = None,
) -> str | None:
    """Return the grammar of an answer as JSON; None if the answer is unconstrained.

    The sizes of the schemas must have been checked with kimi_mlx.text.schema_bounds.

    The schema of a tool that is not `strict` is enforced only if a call is required, and only if it is supported.

    Args:
        special_tokens: special tokens of the tokenizer.
        thinking: result of detect_thinking.
        response_schema: JSON schema of an answer without calls; True allows any object, None any text.
        tools: OpenAI-style tools.
        tool_choice: "auto", "none" (only text), "required" (only calls), or {"name": ...} (one call of that tool).
        parallel_tool_calls: True to allow several calls.
        first_index: index of the first call; a conversation counts its calls from 0.
        schema_name: name of the answer's schema or rule in error messages.
        response_rule: body of a rule in llguidance's dialect of Lark that the answer matches, instead of a schema.

    Raises:
        GrammarError: the schema or the choice cannot be enforced; the message begins with the location.
    """
    choice = _check_choice(tool_choice, tools)
    is_call_required = choice not in ("auto", "none")
    is_strict = any(_is_strict(tool["function"]) for tool in tools)
    restricts_tools = tools and (choice == "none" or not parallel_tool_calls or is_strict)
    if response_schema is None and response_rule is None and not is_call_required and not restricts_tools:
        return None
    response = None
    if response_schema is not None and not is_call_required:
        schema = ANY_OBJECT if response_schema is True else response_schema
        response = to_lark(check_schema(schema, schema_name))
    if response_rule is not None and not is_call_required:
        if problem := find_problem(f"start: {response_rule}"):
            raise GrammarError(f"`{schema_name}`: {problem}")
        response = response_rule
    answer = _Answer(
        thinking,
        response,
        is_call_required,
        [] if choice == "none" else _functions(tools, choice),
        MAX_CALLS if parallel_tool_calls and choice in CHOICES else 1,
        first_index,
    )
    grammar: dict[str, Any] = {"answer": _write(answer, lambda token: f"<[{_id(token, special_tokens)}]>")}
    if answer.functions:
        grammar["arguments"] = {
            f"{PREFIX}{function.name}": f"{NO_FORCING}\nstart: {function.arguments}" for function in answer.functions
        }
        grammar["call_tokens"] = [_id(token, special_tokens) for token in (CALL_BEGIN, ARGUMENT_BEGIN, CALL_END)]
    return json.dumps(grammar)


@dataclass(frozen=True)
class _Function:
    """A tool that may be called.

    Args:
        name: name of the tool.
        arguments: body of the rule for its arguments.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class _Answer:
    """Allowed forms of an answer.

    Args:
        thinking: whether the answer begins with reasoning.
        response: body of the rule for an answer without calls; None for any text.
        is_call_required: True if the answer consists of calls only.
        functions: tools that may be called.
        max_calls: maximum number of calls.
        first_index: index of the first call.
    """

    thinking: Thinking
    response: str | None
    is_call_required: bool
    functions: Sequence[_Function]
    max_calls: int
    first_index: int


def _check_choice(tool_choice: str | Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> str | Mapping[str, Any]:
    """Check that the tools are valid and that the choice names one of them; return the choice."""
    for i, tool in enumerate(tools):
        if not isinstance(tool.get("function"), Mapping):
            raise GrammarError(f"`tools[{i}].function` is missing")
    names = [tool["function"].get("name") for tool in tools]
    if isinstance(tool_choice, str):
        if tool_choice not in CHOICES:
            raise GrammarError(f"`tool_choice` is `{tool_choice}`", hint=f"use {', '.join(CHOICES)}, or name a tool")
        if tool_choice == "required" and not names:
            raise GrammarError("`tool_choice` is `required`, but there are no tools")
    elif tool_choice.get("name") not in names:
        raise GrammarError(f"`tool_choice` names `{tool_choice.get('name')}`, which is not one of the tools")
    return tool_choice


def _functions(tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any]) -> list[_Function]:
    """Return the tools that the choice allows, with the rules of their arguments."""
    functions: list[_Function] = []
    deadline = time.monotonic() + CHECK_S
    for i, tool in enumerate(tools):
        if time.monotonic() > deadline:
            raise GrammarError(f"`tools`: their schemas take more than {CHECK_S:.0f} s to check", hint="simplify them")
        function, where = tool["function"], f"tools[{i}].function"
        name, is_strict = function.get("name"), _is_strict(function)
        if isinstance(choice, Mapping) and name != choice["name"]:
            continue
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
            raise GrammarError(
                f"`{where}.name`: `{name}` is not a valid name", hint=f"a name matches `{TOOL_NAME.pattern}`"
            )
        schema = ANY_OBJECT
        if is_strict or choice != "auto":
            schema = _arguments(function, f"{where}.parameters", is_strict)
        functions.append(_Function(name, to_lark(schema)))
    return functions


def _is_strict(function: Mapping[str, Any]) -> bool:
    return function.get("strict") is True


def _arguments(function: Mapping[str, Any], where: str, is_strict: bool) -> Schema:
    """Return the schema of a tool's arguments. Without `strict`, an unsupported schema is replaced by any object."""
    parameters = function.get("parameters")
    if parameters is None:
        return {**ANY_OBJECT, "additionalProperties": False}
    try:
        if not isinstance(parameters, dict):
            raise GrammarError(f"`{where}` is not the schema of an object")
        schema = {**ANY_OBJECT, **cast("Schema", parameters)}
        if schema["type"] != "object":
            raise GrammarError(f"`{where}: $.type`: arguments must be an object, not `{schema['type']}`")
        return check_schema(schema, where, locates_problem=is_strict)
    except GrammarError:
        if is_strict:
            raise
        return ANY_OBJECT


def _id(token: str, special_tokens: Ids) -> int:
    if token not in special_tokens:
        raise GrammarError(
            f"the model has no `{token}` token, so tool calls cannot be enforced", hint="use another model"
        )
    return special_tokens[token]


def _write(answer: _Answer, token: Callable[[str], str]) -> str:
    """Write the grammar of an answer, without the arguments of its calls.

    Args:
        answer: allowed forms of the answer.
        token: function that returns a control token as grammar text.
    """
    if answer.is_call_required:
        content = "section"
    elif answer.response:
        content = "response | section" if answer.functions else "response"
    else:
        content = "TEXT section?" if answer.functions else "TEXT"
    rules = [NO_FORCING, f"start: {_reasoning(answer.thinking, token)} answer"]
    rules += [f"answer: {content}", r"TEXT: /(.|\n)*/"]
    if answer.response:
        rules.append(f"response: {answer.response}")
    if answer.functions:
        rules += _calls(answer, token)
    return "\n".join(rules)


def _reasoning(thinking: Thinking, token: Callable[[str], str]) -> str:
    if thinking is Thinking.OPEN:
        return f"TEXT {token(THINK_END)}"
    return f"({token(THINK_BEGIN)} TEXT {token(THINK_END)})?" if thinking is Thinking.POSSIBLE else ""


def _calls(answer: _Answer, token: Callable[[str], str]) -> list[str]:
    """Return the rules of a section and of its calls; each call may be followed by the next one."""
    names = "|".join(re.escape(function.name) for function in answer.functions)
    rules = [f"section: {token(SECTION_BEGIN)} call_0 {token(SECTION_END)}", f"NAME: /{re.escape(PREFIX)}({names})/"]
    for i_call in range(answer.max_calls):
        index = json.dumps(f":{answer.first_index + i_call}")
        following = f"call_{i_call + 1}?" if i_call + 1 < answer.max_calls else ""
        call = f"{token(CALL_BEGIN)} NAME {index} {token(ARGUMENT_BEGIN)} {token(CALL_END)}"
        rules.append(f"call_{i_call}: {call} {following}")
    return rules
