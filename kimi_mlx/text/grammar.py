"""Write the rules of an answer that must match a JSON schema or a choice of tools.

    answer:  reasoning? (JSON | text? section?)         then an end token
    section: section-begin call+ section-end
    call:    call-begin functions.NAME:INDEX argument-begin JSON call-end

The rules are JSON, which kimi_mlx.engine.answer_rules reads. If tools are offered and none must be
called, only the calls have rules; the text around them is unconstrained.

The arguments of each tool are a grammar of their own, in llguidance's dialect of Lark. They are compiled once, whatever
the other tools of a request are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any, cast

from kimi_mlx.errors import GrammarError
from kimi_mlx.text.json_schema import ANY_OBJECT, check_schema, find_problem, rule_grammar, to_grammar
from kimi_mlx.text.output import CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, THINK_BEGIN, THINK_END
from kimi_mlx.text.tool_arguments import ANY_ARGUMENTS, arguments_grammar, is_cached
from kimi_mlx.text.tool_calls import ARGUMENT_BEGIN, PREFIX

MAX_CALLS = 16
"""Maximum number of tool calls in an answer that consists of calls, or of a response or calls."""
MAX_NOTES = 8
"""Maximum number of notes per tool; the other keywords that are not enforced are only counted."""
CHECK_S = 2.0
"""Time limit for converting the schemas of a request that are not cached; each usually takes milliseconds.

The remaining schemas are not enforced in this request; later requests convert them."""
ANY_TEXT = rule_grammar(r"/(.|\n)*/")
"""Grammar of any text."""
CHOICES = ("auto", "none", "required")

Ids = Mapping[str, int]
"""Control tokens: text -> id."""

THINK_TOKENS = {"think_begin": THINK_BEGIN, "think_end": THINK_END}
CALL_TOKENS = {
    "section_begin": SECTION_BEGIN,
    "section_end": SECTION_END,
    "call_begin": CALL_BEGIN,
    "argument_begin": ARGUMENT_BEGIN,
    "call_end": CALL_END,
}


class Thinking(Enum):
    """Whether an answer begins with reasoning."""

    OPEN = auto()
    """Yes: the prompt ends in `<think>`."""
    POSSIBLE = auto()
    """Perhaps: the model decides, and writes `<think>` itself."""
    NONE = auto()
    """No: the model does not think, or the prompt has closed the reasoning."""


STARTS = {Thinking.OPEN: "REASONING", Thinking.POSSIBLE: "START", Thinking.NONE: "CONTENT"}
"""Part that an answer begins with, by its name in kimi_mlx.engine.answer_rules."""


def detect_thinking(special_tokens: Ids, prompt: Sequence[int]) -> Thinking:
    """Return how the answer to a prompt begins."""
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
    input_rules: Mapping[str, str] | None = None,
    *,
    constrains_arguments: bool = True,
    notes: list[str] | None = None,
    schema_places: Sequence[str] = (),
) -> str | None:
    """Return the rules of an answer as JSON; None if the answer is unconstrained.

    The sizes of the schemas must have been checked with kimi_mlx.text.schema_bounds.

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
        input_rules: bodies of such rules for the calls of tools whose input is not JSON, by the name of the tool.
        constrains_arguments: False to leave optional calls unconstrained, unless a tool is `strict` or only one call is
            allowed.
        notes: list to which the parts of the tools' schemas are appended that are not enforced, with reasons.
        schema_places: locations of the tools' schemas for the notes; empty for `tools[0].function.parameters` etc.

    Raises:
        GrammarError: the answer's schema or the choice cannot be enforced; the message begins with the location.
    """
    _check_choice(tool_choice, tools)
    is_call_required = tool_choice not in ("auto", "none")
    has_response = response_schema is not None or response_rule is not None
    is_free = not has_response and tool_choice == "auto"
    is_constrained = constrains_arguments or not parallel_tool_calls or input_rules or any(map(_is_strict, tools))
    if is_free and not (tools and is_constrained):
        return None
    if not has_response and tool_choice == "none" and not tools:
        return None
    tokens = {} if is_free or thinking is Thinking.NONE else dict(THINK_TOKENS)
    arguments: dict[str, str] = {}
    if tools and tool_choice != "none":
        if is_free and parallel_tool_calls and not all(token in special_tokens for token in CALL_TOKENS.values()):
            return None  # the model has no calls
        tokens |= CALL_TOKENS
        constrains_all = constrains_arguments or is_call_required
        places = schema_places or [f"tools[{i}].function.parameters" for i in range(len(tools))]
        arguments = _arguments(tools, places, tool_choice, constrains_all, input_rules or {}, notes)
    response = None if is_call_required else _response_grammar(response_schema, response_rule, schema_name)
    max_calls = 1 if not parallel_tool_calls or isinstance(tool_choice, Mapping) else None if is_free else MAX_CALLS
    rules: dict[str, Any] = {
        "start": "FREE" if is_free else STARTS[thinking],
        "has_text": not is_call_required and response is None,
        "response": response,
        "arguments": arguments,
        "any_object": ANY_ARGUMENTS,
        "first_index": first_index,
        "max_calls": max_calls,
        "ends_in_time": is_call_required,
        "tokens": {name: _id(token, special_tokens) for name, token in tokens.items()},
    }
    return json.dumps(rules)


def _response_grammar(schema: Mapping[str, Any] | bool | None, rule: str | None, where: str) -> str | None:
    """Return the grammar of an answer without calls; None for any text. `where` is its location for error messages."""
    if rule is not None:
        grammar = rule_grammar(rule)
        if problem := find_problem(grammar):
            raise GrammarError(f"`{where}`: {problem}")
        return grammar
    if schema is None:
        return None
    return to_grammar(ANY_OBJECT if schema is True else check_schema(schema, where))


def _check_choice(tool_choice: str | Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> None:
    """Check that the tools are functions with names, and that the choice names one of them."""
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise GrammarError(f"`tools[{i}].function` is missing")
        name = cast("Mapping[str, Any]", function).get("name")
        if not isinstance(name, str) or not name.strip():
            raise GrammarError(f"`tools[{i}].function.name`: `{name}` is not a name")
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(tool_choice, str):
        if tool_choice not in CHOICES:
            raise GrammarError(f"`tool_choice` is `{tool_choice}`", hint=f"use {', '.join(CHOICES)}, or name a tool")
        if tool_choice == "required" and not names:
            raise GrammarError("`tool_choice` is `required`, but there are no tools")
    elif tool_choice.get("name") not in names:
        raise GrammarError(f"`tool_choice` names `{tool_choice.get('name')}`, which is not one of the tools")


def _arguments(
    tools: Sequence[Mapping[str, Any]],
    places: Sequence[str],
    tool_choice: str | Mapping[str, Any],
    constrains_all: bool,
    input_rules: Mapping[str, str],
    notes: list[str] | None,
) -> dict[str, str]:
    """Return the grammar of the arguments of each tool that may be called, by the id of its calls without the index.

    Args:
        tools: OpenAI-style tools.
        places: locations of their schemas, for the notes.
        tool_choice: choice of the request.
        constrains_all: False to enforce only the schemas of strict tools.
        input_rules: bodies of rules for the calls of tools whose input is not JSON, by the name of the tool.
        notes: list to which the parts of schemas are appended that are not enforced.
    """
    grammars: dict[str, str] = {}
    deadline = time.monotonic() + CHECK_S
    for tool, where in zip(tools, places, strict=True):
        function = tool["function"]
        name = function["name"]
        if isinstance(tool_choice, Mapping) and name != tool_choice["name"]:
            continue
        if name in input_rules:
            grammars[PREFIX + name] = rule_grammar(input_rules[name])
            if problem := find_problem(grammars[PREFIX + name]):
                grammars[PREFIX + name] = ANY_TEXT
                if notes is not None:
                    notes.append(f"the grammar of the tool `{name}` is not enforced: {problem}")
            continue
        grammars[PREFIX + name] = ANY_ARGUMENTS
        if not constrains_all and not _is_strict(tool):
            continue
        if time.monotonic() > deadline and not is_cached(function.get("parameters")):
            problems = [("", f"the schemas of all tools take more than {CHECK_S:.0f} s to convert")]
        else:
            grammars[PREFIX + name], problems = arguments_grammar(function.get("parameters"))
        if notes is not None:
            notes += [f"`{where}{path}` is not enforced: {problem}" for path, problem in problems[:MAX_NOTES]]
            if len(problems) > MAX_NOTES:
                notes.append(f"`{where}`: {len(problems) - MAX_NOTES} more keywords are not enforced")
    return grammars


def _is_strict(tool: Mapping[str, Any]) -> bool:
    return tool["function"].get("strict") is True


def _id(token: str, special_tokens: Ids) -> int:
    if token not in special_tokens:
        raise GrammarError(
            f"the model has no `{token}` token, so tool calls cannot be enforced", hint="use another model"
        )
    return special_tokens[token]
