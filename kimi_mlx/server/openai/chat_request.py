"""The body of POST /v1/chat/completions, and what is asked with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kimi_mlx.server.conversation import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import Body
from kimi_mlx.text.messages import Message, ToolCall

MAX_ANSWERS = 128
MAX_STOPS = 4
MAX_LOGPROBS = 20
MIN_TOP_P = 1e-6

TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
StopText = Annotated[str, Field(min_length=1)]
Stop = StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class Part(Body):
    """A part of a message."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Body):
    """The call of a function."""

    name: str = Field(min_length=1)
    arguments: str = ""


class Call(Body):
    """A call that an assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    partial: bool | None = Field(None, description="Moonshot's: the last message is gone on from.")


class Function(Body):
    """A function that may be called."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that may be used."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedChoice(Body):
    """The tool that must be used."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Body):
    """A schema that the answer must keep to."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Body):
    """What a stream holds."""

    include_usage: bool | None = None


class Thinking(Body):
    """Moonshot's switch."""

    type: Literal["enabled", "disabled"]


class GenerationBody(Body):
    """What chat and plain completions have in common."""

    model: str | None = None
    max_tokens: TokenCount | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | None = None
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    logit_bias: dict[TokenId, Bias] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Only 0 is supported.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Only 0 is supported.")
    repetition_penalty: float | None = Field(None, description="Only 1 is supported.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def generation_params(self) -> dict[str, Any]:
        """Arguments of a GenerationParams.

        Raises:
            ApiError: what we do not have.
        """
        for name, idle in (("presence_penalty", 0), ("frequency_penalty", 0), ("repetition_penalty", 1)):
            if getattr(self, name) not in (None, idle):
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
        """Whether a stream ends with it."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(GenerationBody):
    """The body of a chat completion."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = Field(None, description="`none`: the model does not reason; else it does.")
    chat_template_kwargs: dict[str, Any] | None = None
    thinking: Thinking | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_old(cls, value: Any) -> Any:
        if isinstance(value, dict) and ("functions" in value or "function_call" in value):
            raise ValueError("`functions` and `function_call` are not supported: use `tools` and `tool_choice`")
        return value  # pyright: ignore[reportUnknownVariableType]

    def to_chat_request(self) -> ChatRequest:
        """What is asked.

        Raises:
            ApiError: what cannot be meant that way, or what we do not have.
        """
        messages, partial = _messages(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "`top_logprobs` needs `logprobs` to be true", "invalid_value", "top_logprobs")
        tools = tuple(tool.model_dump(exclude_none=True) for tool in self.tools or ())
        wish = self.generation_params()
        wish["max_tokens"] = self.max_completion_tokens or self.max_tokens
        return ChatRequest(
            **wish,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            messages=messages,
            tools=tools,
            tool_choice=self._tool_choice(),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            response_schema=self._response_schema(),
            thinking=self._thinking(),
            template_kwargs=self.chat_template_kwargs or {},
            partial=partial,
        )

    def _tool_choice(self) -> str | Mapping[str, str]:
        choice = self.tool_choice or "auto"
        names = {tool.function.name for tool in self.tools or ()}
        if choice == "required" and not names:
            raise ApiError(400, "`tool_choice` is `required`, but there are no tools", param="tool_choice")
        if isinstance(choice, str):
            return choice
        name = choice.function.name
        if name not in names:
            raise ApiError(400, f"`tool_choice` names `{name}`, which is not among the tools", param="tool_choice")
        return {"name": name}

    def _response_schema(self) -> Mapping[str, Any] | bool | None:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return True
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            param = "response_format.json_schema.schema"
            raise ApiError(400, f"`{param}` is missing", "missing_required_parameter", param)
        return wanted.json_schema.schema_

    def _thinking(self) -> bool | None:
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        given = (self.chat_template_kwargs or {}).get("thinking")
        if isinstance(given, bool):
            return given
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"


def _messages(given: list[ChatMessage]) -> tuple[tuple[Message, ...], str | None]:
    """The messages, without the last if it is to be gone on from."""
    messages = [_message(message, f"messages[{at}]") for at, message in enumerate(given)]
    if not given[-1].partial:
        return tuple(messages), None
    if given[-1].role != "assistant":
        raise ApiError(400, "only an assistant's message can be `partial`", param=f"messages[{len(given) - 1}].partial")
    last = messages.pop().content
    assert isinstance(last, str)
    return tuple(messages), last


def _message(message: ChatMessage, where: str) -> Message:
    if message.role == "tool" and not message.tool_call_id:
        raise ApiError(400, "a tool's message needs `tool_call_id`", param=f"{where}.tool_call_id")
    if message.content is None and message.role in ("system", "developer", "user"):
        param = f"{where}.content"
        raise ApiError(400, f"`{param}`: it is missing", "missing_required_parameter", param)
    role = "system" if message.role == "developer" else message.role
    calls = tuple(
        ToolCall(call.id, call.function.name, _arguments(call.function.arguments)) for call in message.tool_calls or ()
    )
    return Message(
        role,
        text_of(message.content, f"{where}.content"),
        message.reasoning_content,
        calls,
        message.tool_call_id,
        message.name,
    )


def text_of(content: str | list[Part] | None, where: str) -> str:
    """The text of a message; its parts are joined.

    Raises:
        ApiError: a part that is no text.
    """
    if not isinstance(content, list):
        return content or ""
    for at, part in enumerate(content):
        if part.type not in ("text", "refusal"):
            message = f"a part of type `{part.type}` cannot be read: the model is served without vision, text only"
            raise ApiError(400, message, "unsupported_content", f"{where}[{at}].type")
    return "".join(part.text or part.refusal or "" for part in content)


def _arguments(text: str) -> str:
    """Arguments of an earlier call; some clients send nothing where there were none."""
    return text if text.strip() else json.dumps({})
