"""Custom tools of OpenAI's APIs, whose input is text: their grammars, and the arguments of their calls.

A custom tool with a grammar gets its input as the bare text of the call, which the grammar constrains. Without one, its
input is JSON like that of any function, `{"input": TEXT}`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

from kimi_mlx.errors import GrammarError
from kimi_mlx.server.openai.typed_tools import object_schema
from kimi_mlx.text.json_schema import find_problem
from kimi_mlx.text.lark_rules import grammar_rule, regex_rule

INPUT = "input"
"""Name of the only parameter of a custom tool without a grammar."""

TEXT_INPUT = object_schema({INPUT: {"type": "string", "description": "Input of the tool, as plain text"}}, INPUT)
"""Schema of the arguments of a custom tool without a grammar."""

MAX_DESCRIBED_CHARS = 20_000
"""Longest grammar that is part of a tool's description."""


@dataclass(frozen=True)
class InputGrammar:
    """The grammar of the input of a custom tool.

    Args:
        syntax: `lark` or `regex`.
        definition: text of the grammar.
        place: location of the grammar in the body.
    """

    syntax: str
    definition: str
    place: str

    def rule(self) -> str:
        """Return the body of the rule that an input matches.

        Raises:
            GrammarError: the grammar is invalid.
        """
        if self.syntax == "lark":
            rule = grammar_rule(self.definition, self.place)
        else:
            rule = regex_rule(self.definition.removeprefix("^").removesuffix("$"))
        if problem := find_problem(f"start: {rule}"):
            raise GrammarError(problem)
        return rule

    def describe(self) -> str:
        """Return the part of the tool's description about its input."""
        form = f"Its input is plain text, without JSON, in this {self.syntax} grammar:\n"
        return form + self.definition[:MAX_DESCRIBED_CHARS]


def decode_input(arguments: str, *, is_free_text: bool) -> str:
    """Return the input of a custom tool from the arguments of a call; other text is the input itself."""
    if is_free_text:
        return arguments
    try:
        value: Any = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    if isinstance(value, dict) and cast("dict[str, Any]", value).keys() == {INPUT} and isinstance(value[INPUT], str):
        return cast("str", value[INPUT])
    return arguments


def encode_input(text: str, *, is_free_text: bool) -> str:
    """Return the arguments of a call of a custom tool."""
    return text if is_free_text else json.dumps({INPUT: text}, ensure_ascii=False)
