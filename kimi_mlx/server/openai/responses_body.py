"""The request body of OpenAI's Responses API.

Source: https://platform.openai.com/docs/api-reference/responses/create.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from kimi_mlx.server.http.body import Body
from kimi_mlx.server.openai.media_parts import MediaFields
from kimi_mlx.server.request_fields import (
    UNSUPPORTED,
    AlternativeCount,
    Arguments,
    ListOf,
    TokenCount,
    text_shorthand,
    type_discriminator,
)

ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")


class ItemPart(MediaFields):
    """A part of an item's content: text, or an image in messages of the user and in results of tools."""

    type: str = Field(description="`input_text`, `output_text`, `input_image`, or Moonshot's `video_url`.")
    text: str | None = None
    refusal: str | None = None


Parts = Annotated[
    ListOf[ItemPart], BeforeValidator(text_shorthand(type="input_text"), json_schema_input_type=str | list[ItemPart])
]


class MessageItem(Body):
    """A message."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class FunctionCallItem(Body):
    """A tool call of the model."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Arguments = None


class FunctionCallOutputItem(Body):
    """The result of a tool call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Parts


class ReasoningItem(Body):
    """Reasoning of the model: its content, or else its summary."""

    type: Literal["reasoning"]
    content: ListOf[ItemPart] | None = None
    summary: ListOf[ItemPart] | None = None


class UnsupportedItem(Body):
    """An item of an unsupported type."""

    type: str | None = None


def _default_type(value: Any) -> str | None:
    """Return the type of an item without a `type`, which only messages may leave out."""
    return "message" if isinstance(value, dict) and "role" in value else None


def _as_items(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("string_or_list_type", "must be a string or a list")
    message: dict[str, Any] = {"type": "message", "role": "user", "content": value}
    return [message] if isinstance(value, str) else value  # pyright: ignore[reportUnknownVariableType]


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[UnsupportedItem, Tag(UNSUPPORTED)],
    Discriminator(type_discriminator(ITEM_TYPES, _default_type)),
]
Items = Annotated[ListOf[Item], BeforeValidator(_as_items, json_schema_input_type=str | list[Item])]


class ResponsesTool(Body):
    """A function of the client, or a tool of OpenAI."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Body):
    """The tool that the model must call."""

    type: str
    name: str | None = None


class ReasoningOptions(Body):
    """Options of the reasoning; the effort only turns it on or off."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(Body):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(Body):
    """Options of the text."""

    format: TextFormat | None = None


class ResponsesBody(Body):
    """The body of POST /v1/responses."""

    model: str | None = None
    input: Items = Field(min_length=1)
    instructions: str | None = None
    stream: bool | None = None
    tools: ListOf[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: TokenCount | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: AlternativeCount | None = None
    include: ListOf[str] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
