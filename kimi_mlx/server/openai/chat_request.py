"""The body of POST /v1/chat/completions, and its conversion to a ChatRequest."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import Body
from kimi_mlx.server.openai.answer_constraint import ConstrainedBody
from kimi_mlx.server.openai.chat_messages import ChatMessage, read_messages
from kimi_mlx.server.openai.chat_tools import ChatTool, NamedChoice, build_table, choose
from kimi_mlx.server.openai.tool_table import ToolTable
from kimi_mlx.server.request_fields import (
    MAX_TOKEN_COUNT,
    MIN_TOP_P,
    AlternativeCount,
    Integer,
    ListOf,
    MinTokens,
    Penalty,
    RepetitionPenalty,
    StopText,
    TokenCount,
)
from kimi_mlx.server.thinking_options import Effort, ThinkingOptions, thinking_fields

MAX_ANSWERS = 128
MAX_STOPS = 4
MAX_STOP_TOKENS = 64

THINKING_SWITCHES = ("thinking", "enable_thinking")
"""Variables of chat templates that turn thinking on or off: Kimi's, and that of other models."""

Stop = StopText | Annotated[ListOf[StopText], Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None


class RouterReasoning(Body):
    """OpenRouter's options of reasoning; `max_tokens` has no effect."""

    effort: Effort | None = None
    enabled: bool | None = None
    exclude: bool | None = None


class GenerationBody(ConstrainedBody):
    """Fields that chat completions and plain completions share."""

    model: str | None = None
    max_tokens: TokenCount | None = Field(None, description="-1 allows the rest of the context.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), Integer] | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Integer] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[ListOf[int], Field(max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description="vLLM's extension."
    )
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS), Integer] | None = None
    logit_bias: dict[TokenId, Bias] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = Field(
        None, description="vLLM's extension: counts tokens of the prompt, too."
    )
    min_tokens: MinTokens | None = Field(None, description="vLLM's extension: no stop token or text ends it earlier.")
    ignore_eos: bool | None = Field(
        None, description="vLLM's extension: the answer has `max_tokens` tokens, as with `min_tokens`."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def generation_params(self) -> dict[str, Any]:
        """Return the fields of GenerationParams."""
        return {
            "max_tokens": self.token_limit,
            "sampling": {
                "temperature": self.temperature,
                "top_p": None if self.top_p is None else max(self.top_p, MIN_TOP_P),
                "top_k": None if self.top_k is None else max(self.top_k, 0),
                "min_p": self.min_p,
                "seed": None if self.seed is None else self.seed % 2**63,
                "frequency_penalty": self.frequency_penalty,
                "presence_penalty": self.presence_penalty,
                "repetition_penalty": self.repetition_penalty,
            },
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "n": self.n or 1,
            "logit_bias": tuple((int(id), bias) for id, bias in (self.logit_bias or {}).items()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "min_tokens": self._min_tokens(),
        }

    @property
    def token_limit(self) -> int | None:
        """Maximum number of new tokens; None if it is not given."""
        return self.max_tokens

    def _min_tokens(self) -> int:
        if not self.ignore_eos:
            return self.min_tokens or 0
        if self.token_limit is None or self.token_limit == MAX_TOKEN_COUNT:
            raise ApiError(400, "`ignore_eos` needs `max_tokens`", "invalid_value", "ignore_eos")
        return self.token_limit

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(GenerationBody):
    """The body of a chat completion."""

    messages: ListOf[ChatMessage] = Field(min_length=1)
    max_completion_tokens: TokenCount | None = Field(None, description="-1 allows the rest of the context.")
    logprobs: bool | None = None
    top_logprobs: AlternativeCount | None = None
    tools: ListOf[ChatTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = Field(None, description="`none` and `minimal` turn thinking off, others on.")
    chat_template_kwargs: dict[str, Any] | None = None
    thinking: ThinkingOptions | None = Field(None, description="Moonshot's options of thinking.")
    enable_thinking: bool | None = None
    reasoning: RouterReasoning | None = Field(None, description="OpenRouter's options of reasoning.")
    include_reasoning: bool | None = Field(None, description="False leaves the reasoning out of the response.")
    add_generation_prompt: bool | None = Field(None, description="False needs `continue_final_message`.")
    continue_final_message: bool | None = Field(None, description="As `partial` in the last message, in vLLM.")
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

    def tool_table(self) -> ToolTable:
        """Return the tools.

        Raises:
            ApiError: a tool is invalid.
        """
        return build_table(self.tools or ())

    def to_chat_request(self, table: ToolTable | None = None) -> ChatRequest:
        """Return the chat request.

        Args:
            table: tools of the body; None to read them.

        Raises:
            ApiError: the body is contradictory, or uses a feature that is not supported.
        """
        if self.add_generation_prompt is False and not self.continue_final_message:
            message = "`add_generation_prompt: false` needs `continue_final_message: true`"
            raise ApiError(400, message, "invalid_value", "add_generation_prompt")
        table = self.tool_table() if table is None else table
        is_continued = bool(self.continue_final_message)
        conversation = read_messages(self.messages, table.rules, is_continued=is_continued)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "`top_logprobs` needs `logprobs` to be true", "invalid_value", "top_logprobs")
        tool_choice = choose(table, self.tool_choice)
        constraint = self.answer_constraint()
        params = self.generation_params()
        params["return_progress"] = bool(self.return_progress)
        partial = conversation.partial
        return ChatRequest(
            **params,
            **self._thinking(),
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            messages=conversation.messages,
            part_places=conversation.part_places,
            tools=tuple(table.functions),
            tool_places=table.places,
            tool_choice=tool_choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            response_schema=constraint and constraint.schema,
            response_rule=constraint and constraint.rule,
            response_schema_name=constraint.name if constraint else "response_format",
            input_rules=table.rules,
            notes=table.notes,
            template_kwargs=self.chat_template_kwargs or {},
            partial=partial and cast("str", partial.content),
            partial_reasoning=(partial and partial.reasoning_content) or "",
            partial_name=partial and partial.name,
        )

    @property
    def token_limit(self) -> int | None:
        """Maximum number of new tokens, from either of its two fields; None if it is not given."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def shows_reasoning(self) -> bool:
        """Whether the response has the reasoning."""
        return self.include_reasoning is not False and not (self.reasoning and self.reasoning.exclude)

    def _thinking(self) -> dict[str, Any]:
        variables = self.chat_template_kwargs or {}
        switches = [*(variables.get(name) for name in THINKING_SWITCHES), self.enable_thinking]
        effort = self.reasoning_effort
        if self.reasoning is not None:
            switches.append(self.reasoning.enabled)
            effort = effort or self.reasoning.effort
        switch = next((switch for switch in switches if isinstance(switch, bool)), None)
        return thinking_fields(self.thinking, effort, switch)
