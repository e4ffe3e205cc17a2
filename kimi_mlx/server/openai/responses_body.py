"""The request body of OpenAI's Responses API.

Source: https://platform.openai.com/docs/api-reference/responses/create.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from kimi_mlx.server.http.body import Body
from kimi_mlx.server.openai.media_parts import MediaFields
from kimi_mlx.server.request_fields import (
    UNSUPPORTED,
    AlternativeCount,
    Arguments,
    ListOf,
    Penalty,
    RepetitionPenalty,
    TokenCount,
    text_shorthand,
    type_discriminator,
)
from kimi_mlx.server.thinking_options import Effort, ThinkingOptions
from kimi_mlx.server.unsupported_fields import CheckedBody


class OpenBody(Body):
    """A part of a body that keeps unknown fields, because the response echoes it."""

    model_config = ConfigDict(extra="allow")


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
    namespace: str | None = None
    arguments: Arguments = None


class CustomToolCallItem(Body):
    """A call of a tool with free text as its input."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    namespace: str | None = None
    input: str


class CallOutputItem(Body):
    """The result of a tool call."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: Parts


class ReasoningItem(Body):
    """Reasoning of the model: the text that the server has sealed, or else its content, or else its summary."""

    type: Literal["reasoning"]
    content: ListOf[ItemPart] | None = None
    summary: ListOf[ItemPart] | None = None
    encrypted_content: str | None = None


class CompactionItem(Body):
    """A summary of the conversation before it, from POST /v1/responses/compact."""

    type: Literal["compaction", "compaction_summary"]
    encrypted_content: str


class ItemReference(Body):
    """A reference to an item of a stored response."""

    type: Literal["item_reference"] | None = None
    id: str


class OtherItem(OpenBody):
    """An item of another type: calls and results of typed tools, and of tools that run at OpenAI."""

    type: str | None = None


ITEM_TYPES: dict[str, type[Body]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": CallOutputItem,
    "custom_tool_call": CustomToolCallItem,
    "custom_tool_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
    "compaction": CompactionItem,
    "compaction_summary": CompactionItem,
    "item_reference": ItemReference,
}


def _default_type(value: Any) -> str | None:
    """Return the type of an item without a `type`, which messages and references may leave out."""
    if not isinstance(value, dict):
        return None
    return "message" if "role" in value else "item_reference" if "id" in value else None


def _as_items(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("string_or_list_type", "must be a string or a list")
    message: dict[str, Any] = {"type": "message", "role": "user", "content": value}
    return [message] if isinstance(value, str) else value  # pyright: ignore[reportUnknownVariableType]


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[CustomToolCallItem, Tag("custom_tool_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[CallOutputItem, Tag("custom_tool_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CompactionItem, Tag("compaction")]
    | Annotated[CompactionItem, Tag("compaction_summary")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[OtherItem, Tag(UNSUPPORTED)],
    Discriminator(type_discriminator(ITEM_TYPES, _default_type)),
]
Items = Annotated[ListOf[Item], BeforeValidator(_as_items, json_schema_input_type=str | list[Item])]


class CustomToolFormat(OpenBody):
    """The format of the input of a custom tool: any text, or text that a grammar describes."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class ResponsesTool(OpenBody):
    """A tool of the client, a namespace of such tools, or a tool that runs at OpenAI, which is left out."""

    type: str = Field(
        description="`function`, `custom`, `namespace`, `local_shell`, `shell`, `apply_patch`, or `tool_search` with "
        "`execution: client`. Tools of other types run at OpenAI: they are left out, and `metadata` of the response "
        "says so."
    )
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: CustomToolFormat | None = None
    tools: ListOf[ResponsesTool] | None = None
    execution: str | None = None


class NamedFunction(Body):
    """The name of a function, as Chat Completions nests it."""

    name: str


class ToolChoice(OpenBody):
    """The tool that the model must call, or the tools among which it may choose (`allowed_tools`)."""

    type: str
    name: str | None = None
    namespace: str | None = None
    function: NamedFunction | None = None
    mode: Literal["auto", "required"] | None = None
    tools: ListOf[ToolChoice] | None = None


class ReasoningOptions(Body):
    """Options of the reasoning."""

    effort: Effort | None = None
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


class ConversationBody(CheckedBody):
    """The fields of a body that determine the prompt."""

    model: str | None = None
    input: Items | None = None
    instructions: str | None = None
    tools: ListOf[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningOptions | None = None
    reasoning_effort: Effort | None = Field(None, description="As in Chat Completions.")
    thinking: ThinkingOptions | None = Field(None, description="Moonshot's options of thinking.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="As in Chat Completions.")
    previous_response_id: str | None = Field(None, description="Id of a stored response, which this one follows.")
    conversation: Any = None
    prompt: Any = None


class ResponsesBody(ConversationBody):
    """The body of POST /v1/responses."""

    stream: bool | None = None
    max_output_tokens: TokenCount | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = Field(None, description="vLLM's extension.")
    top_logprobs: AlternativeCount | None = None
    include: ListOf[str] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = Field(None, description="False if the response is not to be kept in the server's memory.")
    background: bool | None = Field(None, description="Return at once; GET /v1/responses/{id} has the answer later.")


class StoredRequest(Body):
    """The part of an earlier request that a later one needs."""

    input: Items | None = None


class StoredTurn(Body):
    """A stored response as part of a later request: its request, and its output."""

    request: StoredRequest
    output: ListOf[Item]


class ContinuedBody(Body):
    """A request with the stored responses and items that it refers to.

    Args:
        history: stored responses before it, the oldest first.
        items: targets of item references, by id.
        request: body of the request.
    """

    history: ListOf[StoredTurn]
    items: dict[str, Item]
    request: dict[str, Any]
