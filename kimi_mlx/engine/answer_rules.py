"""The rules of a constrained answer, as kimi_mlx.text.grammar writes them in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum, auto
from typing import Any

from kimi_mlx.errors import EngineError


class Part(Enum):
    """Part of an answer that the next token belongs to."""

    FREE = auto()
    """Anything; calls begin with their control tokens."""
    START = auto()
    """`<think>`, or the content."""
    REASONING = auto()
    CONTENT = auto()
    """Text, a response, or the beginning of a section."""
    RESPONSE = auto()
    """The rest of a response."""
    SECTION = auto()
    """The beginning of the first call."""
    CALL_ID = auto()
    ARGUMENTS = auto()
    AFTER_CALL = auto()
    """The next call, or the end of the section."""
    END = auto()
    """An end token."""


@dataclass(frozen=True)
class AnswerRules:
    """Rules of an answer, as kimi_mlx.text.grammar writes them in JSON.

    Args:
        start: name of the part that the answer begins with.
        has_text: whether the content may be text.
        response: grammar of a response; None if the content cannot be one.
        arguments: grammar of each tool's arguments, by the id of its calls without the index: `functions.NAME`.
        any_object: grammar of any JSON object, for arguments whose grammar exceeds the limits.
        first_index: index of the first call.
        max_calls: maximum number of calls; None for no limit.
        ends_in_time: whether the answer is closed before it reaches the maximum number of tokens.
        tokens: ids of control tokens.
    """

    start: str
    has_text: bool
    response: str | None
    arguments: Mapping[str, str]
    any_object: str
    first_index: int
    max_calls: int | None
    ends_in_time: bool
    tokens: Mapping[str, int]

    @classmethod
    def from_json(cls, grammar: str) -> AnswerRules:
        """Read rules.

        Raises:
            EngineError: they are not in the form that kimi_mlx.text.grammar writes.
        """
        try:
            values: dict[str, Any] = json.loads(grammar)
            return cls(**{field.name: values[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError) as error:
            raise EngineError(f"the grammar cannot be compiled: {error!r}") from error
