"""Convert the tools of the Responses API to functions for the model.

| type                              | for the model                                 | item of its calls   |
| --------------------------------- | --------------------------------------------- | ------------------- |
| function                          | the function                                  | function_call       |
| custom                            | a function with one text, or free text        | custom_tool_call    |
| namespace                         | its functions, as NAMESPACE__NAME             | as for a function   |
| local_shell, shell, apply_patch,  | a function with the fields of the item        | local_shell_call,   |
| tool_search (execution: client)   |                                               | shell_call, ...     |
| all others                        | nothing: they run at OpenAI                   |                     |

A custom tool with a grammar gets its input as the bare text of the call, which the grammar constrains. Without one, its
input is JSON like that of any function, `{"input": TEXT}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from kimi_mlx.errors import GrammarError
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.openai.responses_body import CustomToolFormat, OtherItem, ResponsesTool, ToolChoice
from kimi_mlx.server.openai.typed_tools import TOOL_SEARCH_OUTPUT, TYPED_TOOLS, object_schema
from kimi_mlx.server.request_fields import check_tool_choice, unsupported
from kimi_mlx.text.json_schema import find_problem
from kimi_mlx.text.lark_rules import grammar_rule, regex_rule

Value = dict[str, Any]

SEPARATOR = "__"
"""Separates the name of a namespace from that of its tool, as in the names of MCP tools."""

INPUT = "input"
"""Name of the only parameter of a custom tool without a grammar."""

MAX_RULE_CHARS = 500_000
"""Maximum number of characters of all grammars of a request."""

MAX_DESCRIBED_CHARS = 20_000
"""Longest grammar that is part of a tool's description."""

ANY_OBJECT: Value = {"type": "object", "properties": {}}


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
        functions: tools in the format of Chat Completions, as the model sees them.
        names: names in the API, by the names of the functions.
        rules: bodies of the grammar rules for the inputs of free-text tools, by the names of the functions.
    """

    functions: list[Value] = field(default_factory=list[Value])
    names: dict[str, ToolName] = field(default_factory=dict[str, ToolName])
    rules: dict[str, str] = field(default_factory=dict[str, str])
    _places: dict[str, str] = field(default_factory=dict[str, str])
    _left_out: list[str] = field(default_factory=list[str])
    _notes: list[str] = field(default_factory=list[str])

    @classmethod
    def of(cls, tools: Sequence[ResponsesTool], found: Sequence[ResponsesTool] = ()) -> ToolTable:
        """Return the table of a request.

        Args:
            tools: tools of the request.
            found: tools that a search during the conversation has added; those that are in the table already are
                ignored.

        Raises:
            ApiError: a tool has no name, or a name that another one has, or an invalid grammar.
        """
        table = cls()
        for index, tool in enumerate(tools):
            table._add(tool, f"tools[{index}]")
        for tool in found:
            table._add(tool, "input", is_optional=True)
        return table

    def _add(
        self, tool: ResponsesTool, place: str, namespace: ResponsesTool | None = None, is_optional: bool = False
    ) -> None:
        if tool.type == "namespace" and namespace is None:
            _check_name(tool, place)
            for index, inner in enumerate(tool.tools or ()):
                self._add(inner, f"{place}.tools[{index}]", tool, is_optional)
        elif tool.type in ("function", "custom"):
            _check_name(tool, place)
            self._add_named(tool, place, namespace, is_optional)
        elif tool.type in TYPED_TOOLS and _runs_at_client(tool):
            typed = TYPED_TOOLS[tool.type]
            function = _function(typed.name, tool.description or typed.description, tool.parameters or typed.parameters)
            self._insert(function, ToolName(tool.type, typed.name), place, is_optional)
        else:
            label = getattr(tool, "server_label", None)
            self._left_out.append(f"{tool.type:.60} `{label:.60}`" if isinstance(label, str) else f"{tool.type:.60}")

    def _add_named(
        self, tool: ResponsesTool, place: str, namespace: ResponsesTool | None, is_optional: bool = False
    ) -> None:
        assert tool.name is not None
        name = model_name(tool.name, namespace.name if namespace else None)
        description = tool.description or ""
        if namespace is not None and namespace.description and tool is (namespace.tools or [])[0]:
            description = f"({namespace.name}: {namespace.description})\n{description}"
        named = ToolName(tool.type, tool.name, namespace.name if namespace else None)
        if tool.type == "function":
            function = _function(name, description or None, tool.parameters or ANY_OBJECT, tool.strict)
            self._insert(function, named, place, is_optional)
            return
        rule = self._input_rule(tool, f"{place}.format")
        if rule is None:
            parameters = object_schema(
                {INPUT: {"type": "string", "description": "Input of the tool, as plain text"}}, INPUT
            )
            self._insert(_function(name, description or None, parameters), named, place, is_optional)
            return
        assert tool.format is not None
        form = f"Its input is plain text, without JSON, in this {tool.format.syntax} grammar:\n"
        described = form + (tool.format.definition or "")[:MAX_DESCRIBED_CHARS]
        function = _function(name, f"{description}\n{described}".lstrip(), None)
        if self._insert(function, replace(named, is_free_text=True), place, is_optional):
            self.rules[name] = rule

    def _input_rule(self, tool: ResponsesTool, place: str) -> str | None:
        """Return the body of the grammar rule of a custom tool's input; None if its input is any text."""
        if tool.format is None or tool.format.type == "text":
            return None
        try:
            if sum(map(len, self.rules.values())) + len(tool.format.definition or "") > MAX_RULE_CHARS:
                raise GrammarError(f"the grammars of the tools have more than {MAX_RULE_CHARS:,} characters")
            return _rule(tool.format, place)
        except GrammarError as error:
            self._notes.append(f"`{place}` is not enforced: {error.message}")
            return None

    def _insert(self, function: Value, named: ToolName, place: str, is_optional: bool) -> bool:
        """Add a function unless its name is taken; return whether it was added."""
        name: str = function["function"]["name"]
        if name in self.names:
            if is_optional:
                return False
            first = self._places[name]
            message = f"`{place}` has the name `{name:.80}`, as `{first}` has: use different names"
            raise ApiError(400, message, "invalid_value", place)
        self.functions.append(function)
        self.names[name], self._places[name] = named, place
        return True

    @property
    def places(self) -> tuple[str, ...]:
        """Locations of the functions in the body."""
        return tuple(self._places[function["function"]["name"]] for function in self.functions)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about tools that were left out and grammars that are not enforced."""
        names = ", ".join(dict.fromkeys(self._left_out))
        left_out = [f"left out, because they run at OpenAI: {names}"] if names else []
        return (*left_out, *self._notes)

    def choose(self, choice: str | ToolChoice | None) -> str | dict[str, str]:
        """Return the tool choice of a ChatRequest; `allowed_tools` removes all other tools from the table.

        Raises:
            ApiError: the choice names a tool that the model cannot call.
        """
        if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
            allowed = {name for tool in choice.tools or () for name in [self._chosen(tool)] if name is not None}
            self._restrict(allowed)
            choice = (choice.mode or "auto") if self.functions or choice.mode == "required" else "none"
        if choice is None or isinstance(choice, str):
            return check_tool_choice(choice or "auto", self.functions)
        name = self._chosen(choice)
        if name is None:
            hint = "it names no function, custom tool or typed tool that the client runs"
            raise unsupported(f"`tool_choice` of type `{choice.type:.60}` is", "tool_choice", hint)
        return check_tool_choice({"name": name}, self.functions)

    def _chosen(self, choice: ToolChoice) -> str | None:
        """Return the name of the function that a choice refers to; None for a tool that the model cannot call."""
        if choice.type in TYPED_TOOLS:
            return TYPED_TOOLS[choice.type].name
        name = choice.name or (choice.function.name if choice.function else None)
        if choice.type not in ("function", "custom") or not name:
            return None
        joined = model_name(name, choice.namespace)
        inside = [other for other, named in self.names.items() if named.name == name]
        return inside[0] if joined not in self.names and len(inside) == 1 else joined

    def _restrict(self, allowed: Iterable[str]) -> None:
        kept = set(allowed)
        self.functions = [function for function in self.functions if function["function"]["name"] in kept]
        self.rules = {name: rule for name, rule in self.rules.items() if name in kept}


def model_name(name: str, namespace: str | None) -> str:
    """Return the name of a tool for the model."""
    if not namespace:
        return name
    return namespace + name if namespace.endswith(SEPARATOR) else f"{namespace}{SEPARATOR}{name}"


def found_tools(items: Iterable[Any]) -> list[ResponsesTool]:
    """Return the tools that items of a conversation add: results of tool searches, and additional tools."""
    found: list[ResponsesTool] = []
    for item in items:
        if isinstance(item, OtherItem) and item.type in (TOOL_SEARCH_OUTPUT, "additional_tools"):
            tools = getattr(item, "tools", None)
            values = cast("list[Any]", tools) if isinstance(tools, list) else []
            found += [tool for value in values for tool in _parse_tool(value)]
    return found


def _parse_tool(value: Any) -> list[ResponsesTool]:
    try:
        tool = ResponsesTool.model_validate(value)
    except ValueError:  # of a tool that the model cannot call
        return []
    return [tool] if tool.type == "namespace" or tool.name else []


def _runs_at_client(tool: ResponsesTool) -> bool:
    """Return whether the client runs a typed tool. A shell may also run in a container, and a search, at OpenAI."""
    environment = getattr(tool, "environment", None)
    kind: Any = cast("Value", environment).get("type") if isinstance(environment, dict) else None
    if tool.type == "tool_search":
        return tool.execution == "client"
    return tool.type != "shell" or kind in (None, "local")


def _check_name(tool: ResponsesTool, place: str) -> None:
    if not tool.name:
        raise ApiError(400, f"`{place}` has no `name`", "missing_required_parameter", f"{place}.name")


def _function(name: str, description: str | None, parameters: Value | None, strict: bool | None = None) -> Value:
    function = {"name": name, "description": description, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _rule(tool_format: CustomToolFormat, place: str) -> str:
    """Return the body of the grammar rule that the input of a custom tool matches.

    Raises:
        ApiError: the format has no grammar.
        GrammarError: the grammar is invalid.
    """
    for name in ("syntax", "definition"):
        if not getattr(tool_format, name):
            message = f"`{place}.{name}`: required field is missing"
            raise ApiError(400, message, "missing_required_parameter", f"{place}.{name}")
    definition = tool_format.definition or ""
    if tool_format.syntax == "lark":
        rule = grammar_rule(definition, place)
    else:
        rule = regex_rule(definition.removeprefix("^").removesuffix("$"))
    if problem := find_problem(f"start: {rule}"):
        raise GrammarError(problem)
    return rule


def decode_input(arguments: str) -> str:
    """Return the input of a custom tool from the arguments of a call; other text is the input itself."""
    try:
        value: Any = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    if isinstance(value, dict) and cast("Value", value).keys() == {INPUT} and isinstance(value[INPUT], str):
        return cast("str", value[INPUT])
    return arguments


def encode_input(text: str, *, is_free_text: bool) -> str:
    """Return the arguments of a call of a custom tool."""
    return text if is_free_text else json.dumps({INPUT: text}, ensure_ascii=False)
