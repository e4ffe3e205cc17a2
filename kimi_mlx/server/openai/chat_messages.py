"""Messages of Chat Completions, and their conversion to the messages of a ChatRequest.

They may have the reasoning, tool calls and content of other servers and routers, because clients send back the answers
of those.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, Tag, model_validator

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.hosted_calls import hosted_text, is_hosted, read_hosted_parts
from kimi_mlx.server.http.body import Body
from kimi_mlx.server.message_content import ContentBuilder
from kimi_mlx.server.openai.custom_tools import encode_input
from kimi_mlx.server.openai.media_parts import MEDIA_TYPES, MediaFields, add_media, add_result_media
from kimi_mlx.server.request_fields import (
    Arguments,
    ListOf,
    earlier_call,
    missing_field,
    placeholder,
    unsupported_content,
)
from kimi_mlx.text.messages import Content, Message, ToolCall

TEXT_TYPES = ("text", "input_text", "output_text", "refusal")
REASONING_TYPES = ("thinking", "reasoning", "redacted_thinking")
CUSTOM_TYPES = ("custom", "custom_tool_call")

PARAGRAPHS = "\n\n"
"""Separator of the texts in the result of a tool, as in the other APIs."""


class ReasoningPart(Body):
    """A part of earlier reasoning, in one of the formats of routers and other servers; encrypted parts are ignored."""

    text: str | None = None
    summary: str | None = None
    thinking: str | ListOf[ReasoningPart] | None = None

    @property
    def content(self) -> str:
        """Text of the part."""
        parts = self.thinking if isinstance(self.thinking, list) else ()
        thinking = "".join(part.content for part in parts) if parts else self.thinking
        return str(thinking or self.text or self.summary or "")


class ContentPart(ReasoningPart, MediaFields):
    """A part of a message."""

    type: str = Field(description="`text`; `image_url` or `video_url` in messages of the user and results of tools.")
    refusal: str | None = None


class FunctionCall(Body):
    """A function call."""

    name: str = Field(min_length=1)
    arguments: Arguments = None


class FunctionToolCall(Body):
    """A call of a function; a call that another server ran becomes one, so that it may have a result."""

    id: str
    type: str | None = None
    function: FunctionCall

    @model_validator(mode="before")
    @classmethod
    def _read_hosted_call(cls, value: Any) -> Any:
        call = _fields(value)
        if call.get("function") is not None or not is_hosted(call.get("type")):
            return value
        return {"id": _call_id(call), "function": {"name": call["type"], "arguments": _arguments_of_hosted_call(call)}}


class CustomCall(Body):
    """A call of a custom tool."""

    name: str = Field(min_length=1)
    input: str


class CustomToolCall(Body):
    """A call of a tool with free text as its input, also in the flat form of the Responses API."""

    id: str
    type: str | None = None
    custom: CustomCall

    @model_validator(mode="before")
    @classmethod
    def _read_flat_form(cls, value: Any) -> Any:
        call = _fields(value)
        is_flat = call.get("custom") is None and "name" in call
        return {"id": _call_id(call), "custom": call} if is_flat else value


def _fields(value: Any) -> dict[str, Any]:
    """Return the fields of a JSON object; none for any other value."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _call_id(call: Mapping[str, Any]) -> Any:
    return call.get("call_id") or call.get("id") or secrets.token_hex(8)


def _type_of_call(value: Any) -> str:
    call = _fields(value)
    is_custom = call.get("function") is None and call.get("type") in CUSTOM_TYPES
    return "custom" if is_custom or isinstance(value, CustomToolCall) else "function"


ChatToolCall = Annotated[
    Annotated[FunctionToolCall, Tag("function")] | Annotated[CustomToolCall, Tag("custom")],
    Discriminator(_type_of_call),
]


class ChatMessage(Body):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="Name of `reasoning_content` in vLLM.")
    reasoning_details: ListOf[ReasoningPart] | None = Field(None, description="OpenRouter's form of the reasoning.")
    thinking_blocks: ListOf[ReasoningPart] | None = Field(None, description="LiteLLM's form of the reasoning.")
    tool_calls: ListOf[ChatToolCall] | None = None
    tool_call_id: str | None = None
    partial: bool | None = Field(None, description="Moonshot's extension: the answer continues the last message.")
    prefix: bool | None = Field(None, description="Name of `partial` in other APIs.")

    @model_validator(mode="before")
    @classmethod
    def _read_hosted_calls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        message = cast("dict[str, Any]", value)
        if "role" not in message and is_hosted(message.get("type")):
            return {"role": "assistant", "content": hosted_text(message)}
        content = read_hosted_parts(message.get("content"))
        return message if content is message.get("content") else {**message, "content": content}


@dataclass(frozen=True)
class Conversation:
    """The messages of a body.

    Args:
        messages: messages before the answer.
        part_places: locations of the parts of a message with images, by the index of the message.
        partial: beginning of the answer, if the last message is one.
    """

    messages: tuple[Message, ...]
    part_places: Mapping[int, tuple[str, ...]]
    partial: Message | None = None


def read_messages(
    body: Sequence[ChatMessage], free_text_tools: Collection[str] = (), *, is_continued: bool = False
) -> Conversation:
    """Return the conversation of a body.

    Args:
        body: messages, at least one.
        free_text_tools: names of the custom tools whose calls have bare text for the model.
        is_continued: whether the answer continues the last message even if that is not `partial`.

    Raises:
        ApiError: a message lacks a field, has content that is not supported, or cannot be continued.
    """
    messages: list[Message] = []
    part_places: dict[int, tuple[str, ...]] = {}
    for at, message in enumerate(body):
        content, part_places[at] = _content(message, f"messages[{at}].content")
        messages.append(_message(message, content, free_text_tools, f"messages[{at}]"))
    if not (body[-1].partial or body[-1].prefix or is_continued):
        return Conversation(tuple(messages), part_places)
    param = f"messages[{len(body) - 1}]" + ".partial" * bool(body[-1].partial)
    if body[-1].role != "assistant":
        raise ApiError(400, "only a message of role `assistant` can be continued by the answer", param=param)
    if body[-1].tool_calls:
        raise ApiError(400, "a message with tool calls cannot be continued by the answer", param=param)
    return Conversation(tuple(messages[:-1]), part_places, messages[-1])


def _message(message: ChatMessage, content: Content, free_text_tools: Collection[str], location: str) -> Message:
    if message.role == "tool" and not message.tool_call_id:
        raise ApiError(400, "a message of role `tool` needs `tool_call_id`", param=f"{location}.tool_call_id")
    if message.content is None and message.role in ("system", "developer", "user"):
        raise missing_field(f"{location}.content")
    role = "system" if message.role == "developer" else message.role
    calls = tuple(_call(call, free_text_tools) for call in message.tool_calls or ())
    return Message(role, content, _reasoning(message), calls, message.tool_call_id, message.name)


def _call(call: FunctionToolCall | CustomToolCall, free_text_tools: Collection[str]) -> ToolCall:
    if isinstance(call, FunctionToolCall):
        return earlier_call(call.id, call.function.name, call.function.arguments)
    custom = call.custom
    return ToolCall(call.id, custom.name, encode_input(custom.input, is_free_text=custom.name in free_text_tools))


def _content(message: ChatMessage, location: str) -> tuple[Content, tuple[str, ...]]:
    """Return the content of a message, with its texts joined, and the locations of its parts.

    Raises:
        ApiError: a part has a type that a message of this role cannot have.
    """
    if not isinstance(message.content, list):
        return message.content or "", ()
    content = ContentBuilder(PARAGRAPHS if message.role == "tool" else "")
    has_media = message.role in ("user", "tool")
    for at, part in enumerate(message.content):
        place = f"{location}[{at}]"
        if part.type in TEXT_TYPES:
            content.add_text(part.text or part.refusal or "")
        elif part.type in MEDIA_TYPES and message.role == "tool":
            add_result_media(content, part, place)
        elif part.type in MEDIA_TYPES and has_media:
            add_media(content, part, place)
        elif message.role == "tool":
            content.add_text(placeholder(part.type))
        elif part.type not in REASONING_TYPES or message.role != "assistant":
            role = message.role if part.type in (*REASONING_TYPES, *MEDIA_TYPES) else None
            supported = ("text", "image_url") if has_media else ("text",)
            raise unsupported_content(part.type, f"{place}.type", supported, role)
    return content.build()


def _reasoning(message: ChatMessage) -> str | None:
    """Return the reasoning of an earlier answer. Some clients send it in several forms; the first one is used."""
    content = message.content if isinstance(message.content, list) else ()
    in_content = [part for part in content if part.type in REASONING_TYPES]
    details = (message.reasoning_details, message.thinking_blocks, in_content)
    joined = ("".join(part.content for part in parts or ()) for parts in details)
    return next(filter(None, (message.reasoning_content, message.reasoning, *joined)), None)


def _arguments_of_hosted_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a call that are neither its type nor its ids."""
    return {name: value for name, value in call.items() if name not in ("type", "id", "call_id", "status")}
