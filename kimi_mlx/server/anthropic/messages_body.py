"""Request bodies of Anthropic's Messages API.

Source: https://platform.claude.com/docs/en/api/messages. Fields that have no meaning here (`metadata`, `cache_control`,
`service_tier`, ...) and unknown fields are ignored, because clients send new ones with every release. Unknown types of
content are refused, because an answer that ignores them would be wrong; unknown tools are left out, with a note.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from kimi_mlx.server.hosted_calls import read_hosted_parts
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
from kimi_mlx.server.thinking_options import Effort, ThinkingOptions
from kimi_mlx.server.unsupported_fields import CheckedBody

MAX_STOP_SEQUENCES = 64

NO_THREADS = "thread_unsupported_request"
"""Anthropic's code for a request with `thread`, on which clients send the whole conversation instead."""

CLEAR_THINKING = "clear_thinking_20251015"
"""Type of the rule about the reasoning of earlier answers."""

SUPPORTED = {
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "user": ("text", "image", "document", "search_result", "tool_result"),
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


class DocumentSource(Body):
    """The text of a document: `data`, or the texts in `content`. Bytes and URLs of documents are not supported."""

    type: str
    data: str | None = None
    content: Any = None


class DocumentBlock(Body):
    """A document; citations are not supported, and `citations` has no effect."""

    type: Literal["document"]
    source: DocumentSource
    title: str | None = None
    context: str | None = None


class SearchResultBlock(Body):
    """A result of a search that the client has run."""

    type: Literal["search_result"]
    source: str | None = None
    title: str | None = None
    content: ListOf[TextBlock] | None = None


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
    """Content of an unsupported type."""

    type: str


_to_blocks = text_shorthand(type="text")


def _as_blocks(value: Any) -> Any:
    return read_hosted_parts(_to_blocks(value))


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ImageBlock, Tag("image")]
    | Annotated[DocumentBlock, Tag("document")]
    | Annotated[SearchResultBlock, Tag("search_result")]
    | Annotated[UnsupportedBlock, Tag(UNSUPPORTED)],
    Discriminator(type_discriminator(("text", "image", "document", "search_result"))),
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
    | Annotated[DocumentBlock, Tag("document")]
    | Annotated[SearchResultBlock, Tag("search_result")]
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


Size = Annotated[int, Field(ge=1, le=2**31 - 1), Integer]


class MessagesTool(Body):
    """A tool of the client, or one of Anthropic's: a function if the client runs it, otherwise left out with a note."""

    type: str | None = Field(
        None,
        description="`custom`; or a type of Anthropic: `bash_...`, `text_editor_...`, `memory_...` and `computer_...` "
        "need no `input_schema`; tools of other types are left out, and `kimi_mlx_notes` of the response says so.",
    )
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    max_characters: Size | None = Field(None, description="Of `text_editor_...`.")
    display_width_px: Size | None = Field(None, description="Of `computer_...`.")
    display_height_px: Size | None = Field(None, description="Of `computer_...`.")
    enable_zoom: bool | None = Field(None, description="Of `computer_...`.")
    mcp_server_name: str | None = Field(None, description="Of `mcp_toolset`, which is left out.")


class ToolChoice(Body):
    """The tools that the model may or must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ContextEdit(Body):
    """A rule that removes parts of older messages; only `clear_thinking_20251015` with `keep: all` has an effect."""

    type: str
    keep: Any = None

    @property
    def keeps_reasoning(self) -> bool:
        """Whether the reasoning of all earlier answers stays in the prompt."""
        return self.type == CLEAR_THINKING and self.keep in ("all", {"type": "all"})


class ContextManagement(Body):
    """Rules that remove parts of older messages."""

    edits: ListOf[ContextEdit] | None = None


class OutputFormat(Body):
    """The format of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """Options of the output."""

    format: OutputFormat | None = None
    effort: Effort | None = None


class CountBody(CheckedBody):
    """The body of POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: ListOf[InputMessage] = Field(min_length=1)
    system: TextBlocks | None = None
    tools: ListOf[MessagesTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingOptions | None = None
    reasoning_effort: Effort | None = Field(None, description="As in Chat Completions.")
    context_management: ContextManagement | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="As in Chat Completions.")
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # name of `output_config.format` in the API's beta
    mcp_servers: list[Any] | None = Field(None, description="Left out, because their tools run at Anthropic.")
    thread: Any = Field(None, description="Refused: the server holds no conversations.")


class MessagesBody(CountBody):
    """The body of POST /v1/messages."""

    max_tokens: TokenCount | None = Field(None, description="-1 allows the rest of the context.")
    stream: bool | None = None
    stop_sequences: ListOf[StopText] | None = Field(None, max_length=MAX_STOP_SEQUENCES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1), Integer] | None = None
