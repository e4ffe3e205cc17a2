"""The tools of a request to one of OpenAI's APIs, as functions for the model."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from kimi_mlx.errors import GrammarError
from kimi_mlx.server.openai.custom_tools import TEXT_INPUT, InputGrammar
from kimi_mlx.server.request_fields import left_out_note, name_taken

Value = dict[str, Any]

MAX_RULE_CHARS = 500_000
"""Maximum number of characters of all grammars of a request."""

MAX_CHECK_S = 2.0
"""Time limit for checking the grammars of a request; each usually takes milliseconds. The others are not enforced."""


@dataclass(frozen=True)
class ToolName:
    """The name of a tool in the API.

    Args:
        type: `function`, `custom`, or one of TYPED_TOOLS.
        name: its name.
        namespace: namespace of its name.
        is_free_text: whether the arguments of its calls are plain text, not JSON.
    """

    type: str
    name: str
    namespace: str | None = None
    is_free_text: bool = False


@dataclass
class ToolTable:
    """The tools of a request.

    Args:
        host: company whose servers run the tools that are left out.
        functions: tools in the format of Chat Completions, as the model sees them.
        names: names in the API, by the names of the functions.
        rules: bodies of the grammar rules for the inputs of free-text tools, by the names of the functions.
    """

    host: str = "OpenAI"
    functions: list[Value] = field(default_factory=list[Value])
    names: dict[str, ToolName] = field(default_factory=dict[str, ToolName])
    rules: dict[str, str] = field(default_factory=dict[str, str])
    _places: dict[str, str] = field(default_factory=dict[str, str])
    _left_out: list[str] = field(default_factory=list[str])
    _notes: list[str] = field(default_factory=list[str])
    _num_chars: int = 0
    _check_s: float = 0.0

    def add(self, function: Value, tool: ToolName, place: str, *, is_optional: bool = False) -> bool:
        """Add a function; return whether it was added.

        Args:
            function: function in the format of Chat Completions.
            tool: its name in the API.
            place: location of the tool in the body.
            is_optional: whether the function is ignored if its name is taken.

        Raises:
            ApiError: its name is taken.
        """
        name: str = function["function"]["name"]
        if name in self.names:
            if is_optional:
                return False
            raise name_taken(name, place, self._places[name])
        self.functions.append(function)
        self.names[name], self._places[name] = tool, place
        return True

    def add_custom(
        self,
        name: str,
        description: str,
        grammar: InputGrammar | None,
        tool: ToolName,
        place: str,
        *,
        is_optional: bool = False,
    ) -> None:
        """Add a custom tool.

        Args:
            name: its name for the model.
            description: its description; may be empty.
            grammar: grammar of its input; None for any text.
            tool: its name in the API.
            place: location of the tool in the body.
            is_optional: whether the tool is ignored if its name is taken.

        Raises:
            ApiError: its name is taken.
        """
        rule = self._rule(grammar)
        if grammar is None or rule is None:
            self.add(to_function(name, description or None, TEXT_INPUT), tool, place, is_optional=is_optional)
            return
        function = to_function(name, f"{description}\n{grammar.describe()}".lstrip(), None)
        if self.add(function, replace(tool, is_free_text=True), place, is_optional=is_optional):
            self.rules[name] = rule

    def _rule(self, grammar: InputGrammar | None) -> str | None:
        """Return the body of the rule of a grammar; None, with a note, if it cannot be enforced."""
        if grammar is None:
            return None
        try:
            self._num_chars += len(grammar.definition)
            if self._num_chars > MAX_RULE_CHARS:
                raise GrammarError(f"the grammars of the tools have more than {MAX_RULE_CHARS:,} characters")
            if self._check_s > MAX_CHECK_S:
                raise GrammarError(f"the grammars of the tools take more than {MAX_CHECK_S:.0f} s to check")
            began = time.monotonic()
            try:
                return grammar.rule()
            finally:
                self._check_s += time.monotonic() - began
        except GrammarError as error:
            self._notes.append(f"`{grammar.place}` is not enforced: {error.message}")
            return None

    def leave_out(self, label: str) -> None:
        """Note that a tool is left out."""
        self._left_out.append(label)

    def restrict(self, allowed: Collection[str]) -> None:
        """Remove all functions except those with these names."""
        self.functions = [function for function in self.functions if function["function"]["name"] in allowed]
        self.rules = {name: rule for name, rule in self.rules.items() if name in allowed}

    @property
    def places(self) -> tuple[str, ...]:
        """Locations of the functions in the body."""
        return tuple(self._places[function["function"]["name"]] for function in self.functions)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about tools that were left out and grammars that are not enforced."""
        left_out = [left_out_note(self._left_out, f"they run at {self.host}")] if self._left_out else []
        return (*left_out, *self._notes)


def to_function(name: str, description: str | None, parameters: Value | None, strict: bool | None = None) -> Value:
    """Return a function in the format of Chat Completions, without the fields that have no value."""
    function = {"name": name, "description": description, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}
