"""The body of POST /v1/chat/completions, and its conversion to a ChatRequest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import Body
from kimi_mlx.server.message_content import ContentBuilder
from kimi_mlx.server.openai.media_parts import MEDIA_TYPES, MediaFields, add_media
from kimi_mlx.server.request_fields import (
    MIN_TOP_P,
    AlternativeCount,
    Arguments,
    Integer,
    ListOf,
    StopText,
    TokenCount,
    check_tool_choice,
    earlier_call,
    unsupported_content,
)
from kimi_mlx.text.messages import Content, Message

MAX_ANSWERS = 128
MAX_STOPS = 4

TEXT_TYPES = ("text", "input_text", "output_text", "refusal")
REASONING_TYPES = ("thinking", "reasoning", "redacted_thinking")

Stop = StopText | Annotated[ListOf[StopText], Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


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
    """A tool call of the assistant."""

    id: str
    type: Literal["function"] | None = None
    function: FunctionCall


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


class Function(Body):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedChoice(Body):
    """The tool that the model must use."""

    type: Literal["function"] | None = None
    function: NamedFunction


class JsonSchema(Body):
    """A schema that the answer must satisfy."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None


class ThinkingSwitch(Body):
    """Moonshot's switch for thinking."""

    type: Literal["enabled", "disabled"]


class GenerationBody(Body):
    """Fields that chat completions and plain completions share."""

    model: str | None = None
    max_tokens: TokenCount | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), Integer] | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Integer] | None = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS), Integer] | None = None
    logit_bias: dict[TokenId, Bias] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Only 0 is supported.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Only 0 is supported.")
    repetition_penalty: float | None = Field(None, description="Only 1 is supported.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def generation_params(self) -> dict[str, Any]:
        """Return the fields of GenerationParams.

        Raises:
            ApiError: the body uses a feature that is not supported.
        """
        for name, neutral in (("presence_penalty", 0), ("frequency_penalty", 0), ("repetition_penalty", 1)):
            if getattr(self, name) not in (None, neutral):
                raise ApiError(400, f"`{name}` is not supported: leave it out", "unsupported_parameter", name)
        return {
            "max_tokens": self.max_tokens,
            "sampling": {
                "temperature": self.temperature,
                "top_p": None if self.top_p is None else max(self.top_p, MIN_TOP_P),
                "top_k": None if self.top_k is None else max(self.top_k, 0),
                "min_p": self.min_p,
                "seed": None if self.seed is None else self.seed % 2**63,
            },
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "n": self.n or 1,
            "logit_bias": tuple((int(id), bias) for id, bias in (self.logit_bias or {}).items()),
        }

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(GenerationBody):
    """The body of a chat completion."""

    messages: ListOf[ChatMessage] = Field(min_length=1)
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: AlternativeCount | None = None
    tools: ListOf[ChatTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = Field(None, description="`none` turns reasoning off, any other value on.")
    chat_template_kwargs: dict[str, Any] | None = None
    thinking: ThinkingSwitch | None = None
    return_progress: bool | None = Field(
        None, description="As in llama.cpp: streams have the progress of the prompt, and answers have `timings`."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_deprecated(cls, value: Any) -> Any:
        if isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            if any(fields.get(name) is not None for name in ("functions", "function_call")):
                raise ValueError("`functions` and `function_call` are not supported: use `tools` and `tool_choice`")
        return cast("Any", value)

    def to_chat_request(self) -> ChatRequest:
        """Return the chat request.

        Raises:
            ApiError: the body is contradictory, or uses a feature that is not supported.
        """
        messages, part_places, last = _messages(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "`top_logprobs` needs `logprobs` to be true", "invalid_value", "top_logprobs")
        tools = tuple(tool.model_dump(exclude_none=True) for tool in self.tools or ())
        params = self.generation_params()
        params["max_tokens"] = self.max_completion_tokens or self.max_tokens
        params["return_progress"] = bool(self.return_progress)
        return ChatRequest(
            **params,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            messages=messages,
            part_places=part_places,
            tools=tools,
            tool_choice=check_tool_choice(self._tool_choice(), tools),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            response_schema=self._response_schema(),
            response_schema_name=self._response_schema_name,
            thinking=self._thinking(),
            template_kwargs=self.chat_template_kwargs or {},
            partial=None if last is None else _text(last),
            partial_reasoning="" if last is None else last.reasoning_content or "",
        )

    def _tool_choice(self) -> str | dict[str, str]:
        choice = self.tool_choice or "auto"
        return choice if isinstance(choice, str) else {"name": choice.function.name}

    def _response_schema(self) -> Mapping[str, Any] | bool | None:
        response_format = self.response_format
        if response_format is None or response_format.type == "text":
            return None
        if response_format.type == "json_object":
            return True
        if response_format.json_schema is None or response_format.json_schema.schema_ is None:
            param = self._response_schema_name
            raise ApiError(400, f"`{param}`: required field is missing", "missing_required_parameter", param)
        return response_format.json_schema.schema_

    @property
    def _response_schema_name(self) -> str:
        has_schema = self.response_format is not None and self.response_format.type == "json_schema"
        return "response_format.json_schema.schema" if has_schema else "response_format"

    def _thinking(self) -> bool | None:
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        switch = (self.chat_template_kwargs or {}).get("thinking")
        if isinstance(switch, bool):
            return switch
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"


def _messages(body: list[ChatMessage]) -> tuple[tuple[Message, ...], Mapping[int, tuple[str, ...]], Message | None]:
    """Return the messages, the locations of their parts, and separately the last one if it is partial."""
    messages: list[Message] = []
    part_places: dict[int, tuple[str, ...]] = {}
    for at, message in enumerate(body):
        content, part_places[at] = _content(message, f"messages[{at}].content")
        messages.append(_message(message, content, f"messages[{at}]"))
    if not body[-1].partial:
        return tuple(messages), part_places, None
    if body[-1].role != "assistant":
        param = f"messages[{len(body) - 1}].partial"
        raise ApiError(400, "only a message of role `assistant` can be `partial`", param=param)
    last = messages.pop()
    return tuple(messages), part_places, last


def _text(message: Message) -> str:
    assert isinstance(message.content, str)
    return message.content


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
    content = ContentBuilder()
    has_media = message.role in ("user", "tool")
    for at, part in enumerate(message.content):
        place = f"{location}[{at}]"
        if part.type in TEXT_TYPES:
            content.add_text(part.text or part.refusal or "")
        elif part.type in MEDIA_TYPES and has_media:
            add_media(content, part, place)
        elif part.type not in REASONING_TYPES or message.role != "assistant":
            role = message.role if part.type in (*REASONING_TYPES, *MEDIA_TYPES) else None
            supported = ("text", "image_url") if has_media else ("text",)
            raise unsupported_content(part.type, f"{place}.type", supported, role)
    return content.build()


def _reasoning(message: ChatMessage) -> str | None:
    """Return the reasoning of an earlier answer. Some clients send it in several of its forms: the first one counts."""
    content = message.content if isinstance(message.content, list) else ()
    in_content = [part for part in content if part.type in REASONING_TYPES]
    details = (message.reasoning_details, message.thinking_blocks, in_content)
    joined = ("".join(part.content for part in parts or ()) for parts in details)
    return next(filter(None, (message.reasoning_content, message.reasoning, *joined)), None)
