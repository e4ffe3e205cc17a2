"""The grammar of an answer whose tools or schema constrain it, for chat and for every API of the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_mlx.text.grammar import build_grammar, detect_thinking
from kimi_mlx.text.schema_bounds import check_bounds


@dataclass(frozen=True)
class AnswerGrammar:
    """The grammar of an answer.

    Args:
        rules: the grammar, for the engine; None if the answer is unconstrained.
        notes: parts of the tools' schemas that are not enforced, with reasons, each a sentence.
    """

    rules: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """Tools and schema of an answer.

    Args:
        tools: tools in OpenAI's format, `{"type": "function", "function": {...}}`.
        tool_choice: `auto`, `none`, `required`, or `{"name": ...}` of the tool that must be called.
        parallel_tool_calls: whether one answer may call several tools.
        constrains_arguments: whether the schemas of tools are enforced in the arguments of calls. If not, only those of
            required calls and of `strict` tools are.
        response_schema: JSON schema of the answer; True for any JSON object, None for any text.
        input_rules: bodies of grammar rules for the calls of tools whose input is free text, by the name of the tool.
        response_rule: body of a grammar rule that the answer matches, instead of a schema (kimi_mlx.text.lark_rules).
        response_schema_name: location of the schema or the rule, for error messages.
        tool_places: locations of the tools in the request, for messages and notes; empty for `tools[0]` and so on.
        parameters_name: location of a tool's schema in the tool.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, str] = "auto"
    parallel_tool_calls: bool = True
    constrains_arguments: bool = True
    response_schema: Mapping[str, Any] | bool | None = None
    input_rules: Mapping[str, str] = field(default_factory=dict[str, str])
    response_rule: str | None = None
    response_schema_name: str = "response_format"
    tool_places: Sequence[str] = field(default=(), compare=False)
    parameters_name: str = field(default="function.parameters", compare=False)

    @property
    def prompt_tools(self) -> list[Mapping[str, Any]] | None:
        """Tools that the prompt declares; None if there are none, or none may be called."""
        return None if self.tool_choice == "none" else list(self.tools) or None

    def check_schemas(self) -> None:
        """Check number and size of all schemas. Call it before messages are rendered: large schemas take long.

        Raises:
            GrammarError: a bound is exceeded; the message begins with the location.
        """
        check_bounds(self.tools, self.response_schema, self.response_schema_name, self.tool_places)

    def grammar(self, special_tokens: Mapping[str, int], prompt: Sequence[int], num_calls: int) -> AnswerGrammar:
        """Return the grammar of an answer. Call check_schemas() first.

        Args:
            special_tokens: special tokens of the tokenizer.
            prompt: prompt of the answer.
            num_calls: number of tool calls in the conversation so far.

        Raises:
            GrammarError: the schema of the answer or the choice of a tool is invalid; the message begins with the
                location.
        """
        notes: list[str] = []
        rules = build_grammar(
            special_tokens,
            detect_thinking(special_tokens, prompt),
            self.response_schema,
            self.tools,
            self.tool_choice,
            self.parallel_tool_calls,
            num_calls,
            self.response_schema_name,
            self.response_rule,
            self.input_rules,
            constrains_arguments=self.constrains_arguments,
            notes=notes,
            schema_places=[f"{place}.{self.parameters_name}" for place in self.tool_places],
        )
        return AnswerGrammar(rules, tuple(notes))
