"""Messages of Chat Completions, and their conversion to the messages of a ChatRequest.

They may have the reasoning, tool calls and content of other servers and routers, because clients send back the answers
of those.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import Field, model_validator

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.hosted_calls import hosted_text, is_hosted, read_hosted_parts
from kimi_mlx.server.http.body import Body
from kimi_mlx.server.message_content import ContentBuilder
from kimi_mlx.server.openai.media_parts import MEDIA_TYPES, MediaFields, add_media, add_result_media
from kimi_mlx.server.request_fields import Arguments, ListOf, earlier_call, placeholder, unsupported_content
from kimi_mlx.text.messages import Content, Message

TEXT_TYPES = ("text", "input_text", "output_text", "refusal")
REASONING_TYPES = ("thinking", "reasoning", "redacted_thinking")

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


class ChatToolCall(Body):
    """A tool call of the assistant; calls of other types than `function` become calls of a function."""

    id: str
    type: str | None = None
    function: FunctionCall

    @model_validator(mode="before")
    @classmethod
    def _read_other_types(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "function" in value or "type" not in value:
            return cast("Any", value)
        call = cast("dict[str, Any]", value)
        custom = cast("Mapping[str, Any]", call["custom"] if isinstance(call.get("custom"), dict) else call)
        if call["type"] == "custom" or call["type"] == "custom_tool_call":
            function = {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}
        elif is_hosted(call["type"]):
            function = {"name": call["type"], "arguments": _arguments_of_hosted_call(call)}
        else:
            return call
        return {"id": call.get("call_id") or call.get("id") or secrets.token_hex(8), "function": function}


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


def read_messages(body: Sequence[ChatMessage], *, is_continued: bool = False) -> Conversation:
    """Return the conversation of a body.

    Args:
        body: messages, at least one.
        is_continued: whether the answer continues the last message even if that is not `partial`.

    Raises:
        ApiError: a message lacks a field, has content that is not supported, or cannot be continued.
    """
    messages: list[Message] = []
    part_places: dict[int, tuple[str, ...]] = {}
    for at, message in enumerate(body):
        content, part_places[at] = _content(message, f"messages[{at}].content")
        messages.append(_message(message, content, f"messages[{at}]"))
    if not (body[-1].partial or body[-1].prefix or is_continued):
        return Conversation(tuple(messages), part_places)
    param = f"messages[{len(body) - 1}]" + ".partial" * bool(body[-1].partial)
    if body[-1].role != "assistant":
        raise ApiError(400, "only a message of role `assistant` can be continued by the answer", param=param)
    if body[-1].tool_calls:
        raise ApiError(400, "a message with tool calls cannot be continued by the answer", param=param)
    return Conversation(tuple(messages[:-1]), part_places, messages[-1])


def _message(message: ChatMessage, content: Content, location: str) -> Message:
    if message.role == "tool" and not message.tool_call_id:
        raise ApiError(400, "a message of role `tool` needs `tool_call_id`", param=f"{location}.tool_call_id")
    if message.content is None and message.role in ("system", "developer", "user"):
        param = f"{location}.content"
        raise ApiError(400, f"`{param}`: required field is missing", "missing_required_parameter", param)
    role = "system" if message.role == "developer" else message.role
    calls = tuple(
        earlier_call(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()
    )
    return Message(role, content, _reasoning(message), calls, message.tool_call_id, message.name)


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
