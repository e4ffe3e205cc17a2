"""Tools and tool choices of Chat Completions, and their conversion to functions for the model.

| type             | for the model                          | call in the answer                         |
| ---------------- | -------------------------------------- | ------------------------------------------ |
| function         | the function                           | `{"type": "function", "function": {...}}`  |
| custom           | a function with one text, or free text | `{"type": "custom", "custom": {...}}`      |
| builtin_function | nothing: they run at Moonshot          |                                            |

Source: https://platform.openai.com/docs/api-reference/chat/create.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import Body
from kimi_mlx.server.openai.custom_tools import InputGrammar
from kimi_mlx.server.openai.tool_table import ToolName, ToolTable
from kimi_mlx.server.request_fields import ListOf, check_tool_choice, missing_field

BUILTIN = "builtin_function"
"""Type of the tools that run at Moonshot, such as `$web_search`."""


class Function(Body):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomGrammar(Body):
    """The grammar of the input of a custom tool."""

    syntax: Literal["lark", "regex"]
    definition: str = Field(min_length=1)


class CustomFormat(Body):
    """The format of the input of a custom tool: any text, or text that a grammar describes."""

    type: Literal["text", "grammar"]
    grammar: CustomGrammar | None = None


class CustomTool(Body):
    """A tool whose input is text."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    format: CustomFormat | None = None

    def input_grammar(self, place: str) -> InputGrammar | None:
        """Return the grammar of the input; None if it is any text.

        Args:
            place: location of the format in the body.

        Raises:
            ApiError: the format has no grammar.
        """
        if self.format is None or self.format.type == "text":
            return None
        if self.format.grammar is None:
            raise missing_field(f"{place}.grammar")
        return InputGrammar(self.format.grammar.syntax, self.format.grammar.definition, f"{place}.grammar")


class ChatTool(Body):
    """A tool that the model may use. Moonshot's `builtin_function` is left out, and `kimi_mlx_notes` says so."""

    type: Literal["function", "custom", "builtin_function"]
    function: Function | None = None
    custom: CustomTool | None = None


class NamedFunction(Body):
    """The name of a function or of a custom tool."""

    name: str


class NamedTool(Body):
    """The name of a tool, in the form of Chat Completions or in the flat one of the Responses API."""

    type: Literal["function", "custom", "builtin_function", "allowed_tools"] | None = None
    function: NamedFunction | None = None
    custom: NamedFunction | None = None
    name: str | None = None

    def tool_name(self, place: str) -> str:
        """Return the name.

        Raises:
            ApiError: there is none.
        """
        named = self.function or self.custom
        name = named.name if named else self.name
        if not name:
            raise missing_field(f"{place}.{'custom' if self.type == 'custom' else 'function'}")
        return name


class AllowedTools(Body):
    """The tools among which the model may choose."""

    mode: Literal["auto", "required"] | None = None
    tools: ListOf[NamedTool]


class NamedChoice(NamedTool):
    """The tool that the model must use, or the tools among which it may choose."""

    allowed_tools: AllowedTools | None = None


def build_table(tools: Sequence[ChatTool]) -> ToolTable:
    """Return the tools of a request.

    Raises:
        ApiError: a tool lacks a field, or has a name that another one has.
    """
    table = ToolTable("Moonshot")
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        if tool.type == "custom":
            if tool.custom is None:
                raise missing_field(f"{place}.custom")
            grammar = tool.custom.input_grammar(f"{place}.custom.format")
            name = ToolName("custom", tool.custom.name)
            table.add_custom(tool.custom.name, tool.custom.description or "", grammar, name, place)
        elif tool.function is None:
            raise missing_field(f"{place}.function")
        elif tool.type == "function":
            function = {"type": "function", "function": tool.function.model_dump(exclude_none=True)}
            table.add(function, ToolName("function", tool.function.name), place)
        else:
            table.leave_out(f"{tool.type} `{tool.function.name:.60}`")
    return table


def choose(table: ToolTable, choice: str | NamedChoice | None) -> str | dict[str, str]:
    """Return the tool choice of a ChatRequest; `allowed_tools` removes all other tools from the table.

    Raises:
        ApiError: the choice names a tool that the model cannot call.
    """
    if choice is None or isinstance(choice, str):
        return check_tool_choice(choice or "auto", table.functions)
    if choice.allowed_tools is None:
        return check_tool_choice({"name": choice.tool_name("tool_choice")}, table.functions)
    place = "tool_choice.allowed_tools.tools"
    named = [(tool.type, tool.tool_name(f"{place}[{at}]")) for at, tool in enumerate(choice.allowed_tools.tools)]
    names = {name for kind, name in named if kind != BUILTIN}
    if unknown := names - table.names.keys():
        message = f"`{place}` names `{min(unknown):.80}`, which is not among the tools"
        raise ApiError(400, message, "invalid_value", place)
    table.restrict(names)
    return check_tool_choice(choice.allowed_tools.mode or "auto", table.functions)
