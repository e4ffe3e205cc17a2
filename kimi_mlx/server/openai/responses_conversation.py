"""Convert the items of the Responses API to messages.

Reasoning, text and calls of one assistant message are separate items. Calls that ran at OpenAI, in conversations that
began there, become text if that is useful to the model; otherwise they are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from kimi_mlx.server.hosted_calls import hosted_text, is_hosted
from kimi_mlx.server.message_content import ContentBuilder
from kimi_mlx.server.openai.custom_tools import encode_input
from kimi_mlx.server.openai.media_parts import MEDIA_TYPES, add_media, add_result_media
from kimi_mlx.server.openai.responses_body import (
    CallOutputItem,
    CompactionItem,
    CustomToolCallItem,
    FunctionCallItem,
    Item,
    ItemPart,
    ItemReference,
    MessageItem,
    OtherItem,
    ReasoningItem,
)
from kimi_mlx.server.openai.responses_tools import model_name
from kimi_mlx.server.openai.sealed_text import unseal
from kimi_mlx.server.openai.tool_table import ToolTable
from kimi_mlx.server.openai.typed_tools import CALL_SUFFIX, OUTPUT_SUFFIX, TOOL_SEARCH_OUTPUT, TYPED_TOOLS
from kimi_mlx.server.request_fields import earlier_call, placeholder, unsupported_content
from kimi_mlx.text.messages import Message, ToolCall

TEXT_TYPES = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")

SUMMARY_HEADING = "Summary of the conversation so far:\n\n"
"""Precedes a summary from POST /v1/responses/compact in the prompt."""

MAX_HOSTED_CHARS = 20_000
"""Longest text of a call that ran at OpenAI."""

WITHOUT_TEXT = (
    *("image_generation_call", "computer_call", "computer_call_output", "mcp_list_tools", "mcp_approval_request"),
    *("program", "program_output"),
)
"""Items that are left out, because they have no text that is useful to the model."""


class ConversationBuilder:
    """Assembles messages from items.

    Args:
        instructions: system message before all items.
        table: tools of the request, which determine the form of the arguments of custom tools.
    """

    def __init__(self, instructions: str | None, table: ToolTable):
        self.messages = [Message("system", instructions)] if instructions else []
        self.places = ["instructions"] if instructions else []
        self.part_places: dict[int, tuple[str, ...]] = {}
        self._free_text = table.rules.keys()
        self._place = ""  # location of the last item that is part of an assistant message
        self._reasoning: list[str] = []
        self._text: list[str] = []
        self._calls: list[ToolCall] = []
        self._call_ids: set[str] = set()
        self._has_only_hosted_text = True

    def add_items(self, items: Sequence[Item], location: str, references: Mapping[str, Item]) -> None:
        """Append items.

        Args:
            items: items of a request, or of an earlier one.
            location: location of the items in the body, for error messages; with `{}` for the index.
            references: items of stored responses by id.

        Raises:
            ApiError: an item has content that the model cannot have.
        """
        for index, item in enumerate(items):
            place = location.format(index)
            if isinstance(item, ItemReference):
                item = references[item.id]
            self._add(item, place)

    def end(self) -> None:
        """End the last message."""
        self._end_message()

    def add_message(self, role: str, text: str, place: str) -> None:
        """Append a message of plain text."""
        self._end_message()
        self.messages.append(Message(role, text))
        self.places.append(place)

    def _add(self, item: Item, location: str) -> None:
        if isinstance(item, ReasoningItem):
            if self._text or self._calls:
                self._end_message()
            self._place = location
            self._reasoning.append(_reasoning(item))
        elif isinstance(item, FunctionCallItem):
            self._add_call(earlier_call(item.call_id, model_name(item.name, item.namespace), item.arguments), location)
        elif isinstance(item, CustomToolCallItem):
            name = model_name(item.name, item.namespace)
            arguments = encode_input(item.input, is_free_text=name in self._free_text)
            self._add_call(ToolCall(item.call_id, name, arguments), location)
        elif isinstance(item, CallOutputItem):
            self._add_result(item.call_id, _result(item, f"{location}.output"), location)
        elif isinstance(item, MessageItem):
            self._add_message(item, _content(item, f"{location}.content"), location)
        elif isinstance(item, CompactionItem):
            if summary := unseal(item.encrypted_content):
                self.add_message("user", SUMMARY_HEADING + summary, location)
        elif isinstance(item, OtherItem):
            self._add_other(item.model_dump(), location)

    def _add_other(self, item: dict[str, Any], location: str) -> None:
        """Append the call or the result of a typed tool, or the text of a call that ran at OpenAI."""
        kind = str(item.get("type"))
        call_id = item.get("call_id") or item.get("id")
        if kind == TOOL_SEARCH_OUTPUT:
            tool, is_result = "tool_search", True
        else:
            tool, is_result = kind.removesuffix(OUTPUT_SUFFIX).removesuffix(CALL_SUFFIX), kind.endswith(OUTPUT_SUFFIX)
        is_server = item.get("execution") == "server"
        if tool not in TYPED_TOOLS or not isinstance(call_id, str) or is_server:
            if is_hosted(kind) and kind not in WITHOUT_TEXT:
                self._place = location
                self._text.append(hosted_text(item)[:MAX_HOSTED_CHARS])
        elif not is_result:
            typed = TYPED_TOOLS[tool]
            arguments = json.dumps(typed.to_arguments(item), ensure_ascii=False)
            self._add_call(ToolCall(call_id, typed.name, arguments), location)
        elif call_id in self._call_ids:
            content = ContentBuilder()
            content.add_text(_typed_result(item))
            self._add_result(call_id, content, location)

    def _add_call(self, call: ToolCall, location: str) -> None:
        self._place = location
        self._calls.append(call)
        self._call_ids.add(call.id)

    def _add_result(self, call_id: str, content: ContentBuilder, location: str) -> None:
        self._end_message()
        built, self.part_places[len(self.messages)] = content.build()
        self.messages.append(Message("tool", built, tool_call_id=call_id))
        self.places.append(location)

    def _add_message(self, item: MessageItem, content: ContentBuilder, location: str) -> None:
        built, part_places = content.build()
        if isinstance(built, str) and item.role == "assistant":
            if self._text and not self._has_only_hosted_text:
                self._end_message()
            self._place = location
            self._text.append(built)
            self._has_only_hosted_text = False
            return
        self._end_message()
        self.part_places[len(self.messages)] = part_places
        self.messages.append(Message("system" if item.role == "developer" else item.role, built))
        self.places.append(location)

    def _end_message(self) -> None:
        """Add an assistant message with the reasoning, text and calls since the last message."""
        if self._reasoning or self._text or self._calls:
            reasoning = "".join(self._reasoning) or None
            text = "\n\n".join(self._text)
            self.messages.append(Message("assistant", text, reasoning, tuple(self._calls)))
            self.places.append(self._place)
        self._reasoning, self._text, self._calls = [], [], []
        self._has_only_hosted_text = True


def _reasoning(item: ReasoningItem) -> str:
    """Return the reasoning of an item: its sealed text, or else the visible text, which clients may have shortened."""
    sealed = unseal(item.encrypted_content) if item.encrypted_content else None
    return sealed if sealed is not None else "".join(part.text or "" for part in item.content or item.summary or ())


def _content(item: MessageItem, location: str) -> ContentBuilder:
    """Return the content of a message.

    Raises:
        ApiError: a part has a type that a message of this role cannot have.
    """
    content = ContentBuilder()
    for index, part in enumerate(item.content):
        place = f"{location}[{index}]"
        if part.type in TEXT_TYPES:
            content.add_text(part.text or part.refusal or "")
        elif part.type in MEDIA_TYPES and item.role == "user":
            add_media(content, part, place)
        else:
            supported = ("input_text", "input_image" if item.role == "user" else "output_text")
            role = item.role if part.type in MEDIA_TYPES else None
            raise unsupported_content(part.type, f"{place}.type", supported, role)
    return content


def _result(item: CallOutputItem, location: str) -> ContentBuilder:
    """Return the content of a tool's result."""
    content = ContentBuilder("\n\n")
    for index, part in enumerate(item.output):
        _add_part(content, part, f"{location}[{index}]")
    return content


def _add_part(content: ContentBuilder, part: ItemPart, place: str) -> None:
    if part.type in MEDIA_TYPES:
        add_result_media(content, part, place)
    else:
        content.add_text(part.text or "" if part.type in TEXT_TYPES else placeholder(part.type))


def _typed_result(item: Mapping[str, Any]) -> str:
    """Return the text of the result of a typed tool."""
    if item.get("type") == TOOL_SEARCH_OUTPUT:
        names = [str(tool.get("name")) for tool in _dicts(item.get("tools"))]
        return f"Tools found: {', '.join(names)}" if names else "No tools found"
    output = item.get("output")
    if isinstance(output, list):
        return "\n".join(_command_output(part) for part in _dicts(cast("object", output)))
    text = output if isinstance(output, str) else ""
    return text or str(item.get("status") or "")


def _command_output(part: Mapping[str, Any]) -> str:
    """Return the output of one command of a shell as text."""
    outcome = part.get("outcome")
    details: Any = cast("object", outcome) if isinstance(outcome, dict) else {}
    code = details.get("exit_code")
    end = "timed out" if details.get("type") == "timeout" else f"exit code {code}" if code else ""
    return "\n".join(filter(None, (str(part.get("stdout") or ""), str(part.get("stderr") or ""), end)))


def _dicts(value: object) -> Iterable[Mapping[str, Any]]:
    values = cast("list[object]", value) if isinstance(value, list) else []
    return [cast("Mapping[str, Any]", part) for part in values if isinstance(part, dict)]
