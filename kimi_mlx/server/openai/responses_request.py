"""Conversion of the request body of OpenAI's Responses API to a ChatRequest.

Nothing is stored between requests: a client sends the whole conversation each time. Requests that need stored state, or
OpenAI's own tools, are refused.
"""

from __future__ import annotations

from typing import Any

from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.message_content import ContentBuilder
from kimi_mlx.server.openai.media_parts import MEDIA_TYPES, add_media
from kimi_mlx.server.openai.responses_body import (
    FunctionCallItem,
    FunctionCallOutputItem,
    Item,
    MessageItem,
    NamedTool,
    ReasoningItem,
    ResponsesBody,
    ResponsesTool,
    TextFormat,
)
from kimi_mlx.server.request_fields import (
    MIN_TOP_P,
    check_tool_choice,
    earlier_call,
    placeholder,
    unsupported,
    unsupported_content,
)
from kimi_mlx.text.messages import Message, ToolCall

TEXT_TYPES = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")


def to_chat_request(body: ResponsesBody) -> ChatRequest:
    """Return the chat request of a body.

    Raises:
        ApiError: the body uses a feature that is not supported.
    """
    _refuse_state(body)
    top_p = None if body.top_p is None else max(body.top_p, MIN_TOP_P)
    tools = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ()))
    conversation = _Conversation(body)
    return ChatRequest(
        max_tokens=body.max_output_tokens,
        sampling={"temperature": body.temperature, "top_p": top_p},
        top_logprobs=_top_logprobs(body),
        messages=tuple(conversation.messages),
        messages_name="input",
        places=tuple(conversation.places),
        part_places=conversation.part_places,
        tools=tools,
        tool_choice=check_tool_choice(_tool_choice(body.tool_choice), tools),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_schema=_response_schema(body.text and body.text.format),
        response_schema_name="text.format.schema",
        thinking=_thinking(body.reasoning and body.reasoning.effort),
    )


def _refuse_state(body: ResponsesBody) -> None:
    """Refuse requests that need stored state."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(body, name) is not None:
            raise unsupported(f"`{name}` is", name, "responses are not stored; send the whole conversation as `input`")
    if body.background:
        raise unsupported("`background` is", "background", "responses are not stored; use `stream` instead")


class _Conversation:
    """Assembles messages from items: reasoning, text and calls of one assistant message are separate items."""

    def __init__(self, body: ResponsesBody):
        self.messages = [Message("system", body.instructions)] if body.instructions else []
        self.places = ["instructions"] if body.instructions else []
        self.part_places: dict[int, tuple[str, ...]] = {}
        self._place = ""  # location of the last item that is part of an assistant message
        self._reasoning: list[str] = []
        self._text = ""
        self._calls: list[ToolCall] = []
        for index, item in enumerate(body.input):
            self._add(item, f"input[{index}]")
        self._end_message()

    def _add(self, item: Item, location: str) -> None:
        if isinstance(item, ReasoningItem):
            if self._text or self._calls:
                self._end_message()
            self._place = location
            self._reasoning += [part.text or "" for part in item.content or item.summary or ()]
        elif isinstance(item, FunctionCallItem):
            self._place = location
            self._calls.append(earlier_call(item.call_id, item.name, item.arguments))
        elif isinstance(item, MessageItem):
            self._add_message(item, _content(item, f"{location}.content"), location)
        elif isinstance(item, FunctionCallOutputItem):
            self._end_message()
            content, self.part_places[len(self.messages)] = _result(item, f"{location}.output").build()
            self.messages.append(Message("tool", content, tool_call_id=item.call_id))
            self.places.append(location)
        elif item.type in ("item_reference", None):
            raise unsupported("references to items are", location, "items are not stored; send the item itself")
        else:
            raise unsupported(f"items of type `{item.type:.60}` are", location)

    def _add_message(self, item: MessageItem, content: ContentBuilder, location: str) -> None:
        built, part_places = content.build()
        if isinstance(built, str) and item.role == "assistant":
            if self._text:
                self._end_message()
            self._place = location
            self._text = built
            return
        self._end_message()
        self.part_places[len(self.messages)] = part_places
        self.messages.append(Message("system" if item.role == "developer" else item.role, built))
        self.places.append(location)

    def _end_message(self) -> None:
        """Add an assistant message with the reasoning, text and calls since the last message."""
        if self._reasoning or self._text or self._calls:
            reasoning = "".join(self._reasoning) or None
            self.messages.append(Message("assistant", self._text, reasoning, tuple(self._calls)))
            self.places.append(self._place)
        self._reasoning, self._text, self._calls = [], "", []


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


def _result(item: FunctionCallOutputItem, location: str) -> ContentBuilder:
    """Return the content of a tool's result."""
    content = ContentBuilder("\n\n")
    for index, part in enumerate(item.output):
        if part.type in MEDIA_TYPES:
            add_media(content, part, f"{location}[{index}]")
        else:
            content.add_text(part.text or "" if part.type in TEXT_TYPES else placeholder(part.type))
    return content


def _tool(tool: ResponsesTool, location: str) -> dict[str, Any]:
    """Return the tool in the format of Chat Completions."""
    if tool.type != "function":
        raise unsupported(f"tools of type `{tool.type:.60}` are", location, "send it as a function with `parameters`")
    if not tool.name:
        raise ApiError(400, f"`{location}` has no `name`", "missing_required_parameter", f"{location}.name")
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters, "strict": tool.strict}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _tool_choice(choice: str | NamedTool | None) -> str | dict[str, str]:
    if not isinstance(choice, NamedTool):
        return choice or "auto"
    if choice.type != "function" or not choice.name:
        raise unsupported(f"`tool_choice` of type `{choice.type:.60}` is", "tool_choice", "name a function")
    return {"name": choice.name}


def _response_schema(text_format: TextFormat | None) -> dict[str, Any] | bool | None:
    if text_format is None or text_format.type == "text":
        return None
    if text_format.type == "json_object":
        return True
    if text_format.schema_ is None:
        raise ApiError(400, "`text.format` has no `schema`", "missing_required_parameter", "text.format.schema")
    return text_format.schema_


def _thinking(effort: str | None) -> bool | None:
    """Return whether to think: all other efforts mean the same; without an effort the template decides."""
    return None if effort is None else effort not in ("none", "minimal")


def _top_logprobs(body: ResponsesBody) -> int | None:
    is_included = "message.output_text.logprobs" in (body.include or ())
    return body.top_logprobs or 0 if is_included or body.top_logprobs else None
