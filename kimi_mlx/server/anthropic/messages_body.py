"""Request bodies of Anthropic's Messages API.

Source: https://platform.claude.com/docs/en/api/messages. Fields that have no meaning here (`metadata`, `cache_control`,
`service_tier`, ...) and unknown fields are ignored, because clients send new ones with every release. Unknown types of
content and tools are refused, because an answer that ignores them would be wrong.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from kimi_mlx.server.http.body import Body
from kimi_mlx.server.request_fields import (
    UNSUPPORTED,
    Arguments,
    Integer,
    ListOf,
    StopText,
    TokenCount,
    text_shorthand,
    type_discriminator,
)

MAX_STOP_SEQUENCES = 64

SUPPORTED = {
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "user": ("text", "image", "tool_result"),
    "system": ("text",),
}
"""Types of content by the role of their message."""


class TextBlock(Body):
    """A block of text."""

    type: Literal["text"]
    text: str


class ImageSource(Body):
    """The bytes of an image, or its URL. The media type is ignored, because the bytes show it."""

    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    file_id: str | None = None


class ImageBlock(Body):
    """An image."""

    type: Literal["image"]
    source: ImageSource


class ThinkingBlock(Body):
    """Reasoning of the model; its signature is ignored."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Body):
    """Encrypted reasoning of another model; it is ignored."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Body):
    """A tool call of the model."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Arguments = None


class UnsupportedBlock(Body):
    """Content of an unsupported type: documents, results of Anthropic's own tools."""

    type: str


_as_blocks = text_shorthand(type="text")

ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ImageBlock, Tag("image")]
    | Annotated[UnsupportedBlock, Tag(UNSUPPORTED)],
    Discriminator(type_discriminator(("text", "image"))),
]
ResultBlocks = Annotated[
    ListOf[ResultBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[ResultBlock])
]


class ToolResultBlock(Body):
    """The result of a tool call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: ResultBlocks | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ImageBlock, Tag("image")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[UnsupportedBlock, Tag(UNSUPPORTED)],
    Discriminator(type_discriminator({*SUPPORTED["assistant"], *SUPPORTED["user"]})),
]
Blocks = Annotated[ListOf[Block], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])]
TextBlocks = Annotated[ListOf[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])]


class InputMessage(Body):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class MessagesTool(Body):
    """A tool of the client; with a `type` other than `custom`, one of Anthropic's own tools."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Body):
    """The tools that the model may or must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Body):
    """The thinking mode; the amount of thinking cannot be set."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class OutputFormat(Body):
    """The format of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """Options of the output."""

    format: OutputFormat | None = None


class CountBody(Body):
    """The body of POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: ListOf[InputMessage] = Field(min_length=1)
    system: TextBlocks | None = None
    tools: ListOf[MessagesTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # name of `output_config.format` in the API's beta
    mcp_servers: list[Any] | None = None


class MessagesBody(CountBody):
    """The body of POST /v1/messages."""

    max_tokens: TokenCount | None = None
    stream: bool | None = None
    stop_sequences: ListOf[StopText] | None = Field(None, max_length=MAX_STOP_SEQUENCES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1), Integer] | None = None
