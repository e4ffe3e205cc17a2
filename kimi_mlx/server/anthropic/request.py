"""Anthropic's Messages API on the way in: the body of a request, and the ChatRequest that it means.

Source: https://platform.claude.com/docs/en/api/messages. Fields that have no meaning here (`metadata`, `cache_control`,
`service_tier`, ...) and unknown ones are ignored, since clients send new ones with every release. Unknown kinds of
content and tools are refused: an answer that passes over them would be wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag

from kimi_mlx.server.conversation import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import Body
from kimi_mlx.server.openai.chat_request import MIN_TOP_P, StopText, TokenCount
from kimi_mlx.server.request_fields import (
    UNSUPPORTED,
    check_tool_choice,
    text_shorthand,
    type_discriminator,
    unsupported,
)
from kimi_mlx.text.messages import Message, ToolCall

CALL_ID_PREFIX = "toolu_"
MAX_STOP_SEQUENCES = 64
# Claude Code writes this line, with a number that changes each time, before its system prompt. It says nothing to
# a model, and with it no request could share its beginning with the one before.
BILLING_HEADER = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n?")


class TextBlock(Body):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Body):
    """What the model thought; its signature is not looked at."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Body):
    """What another model thought, in a form that only its maker can read; it is passed over."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Body):
    """A call of the model."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class UnsupportedBlock(Body):
    """Content of a kind that is not served: images, documents, results of Anthropic's own tools."""

    type: str


_as_blocks = text_shorthand(type="text")

ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text")] | Annotated[UnsupportedBlock, Tag(UNSUPPORTED)],
    Discriminator(type_discriminator(("text",))),
]
ResultBlocks = Annotated[list[ResultBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[ResultBlock])]


class ToolResultBlock(Body):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: ResultBlocks | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[UnsupportedBlock, Tag(UNSUPPORTED)],
    Discriminator(type_discriminator(("text", "thinking", "redacted_thinking", "tool_use", "tool_result"))),
]
Blocks = Annotated[list[Block], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])]
TextBlocks = Annotated[list[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])]


class Turn(Body):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class Tool(Body):
    """A tool of the client's, or, with a type of its own and no schema, one of Anthropic's."""

    type: str | None = None
    name: str = ""
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Body):
    """Whether and which tools are to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    """Whether the model thinks; how much cannot be set."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class Format(Body):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How the answer is to look."""

    format: Format | None = None


class CountBody(Body):
    """What `/v1/messages/count_tokens` is sent."""

    model: str | None = None
    messages: list[Turn] = Field(min_length=1)
    system: TextBlocks | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None  # its name in the API's beta
    mcp_servers: list[Any] | None = None


class MessagesBody(CountBody):
    """What `/v1/messages` is sent."""

    max_tokens: TokenCount | None = None
    stream: bool | None = None
    stop_sequences: list[StopText] | None = Field(None, max_length=MAX_STOP_SEQUENCES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)


def to_chat_request(body: CountBody) -> ChatRequest:
    """Return what a body asks for.

    Raises:
        ApiError: it asks for something that is not served.
    """
    if body.mcp_servers:
        raise unsupported("`mcp_servers` are", "mcp_servers")
    turns, partial = _split_prefill(body.messages)
    system = _join(_without_header(block.text) for block in body.system or ())
    messages = [Message("system", system)] if system else []
    for index, turn in enumerate(turns):
        messages += _messages(turn, f"messages.{index}.content")
    given = body if isinstance(body, MessagesBody) else None
    tools = tuple(_tool(tool, f"tools.{index}") for index, tool in enumerate(body.tools or ()))
    choice = body.tool_choice
    config_form = body.output_config and body.output_config.format
    form = config_form or body.output_format
    return ChatRequest(
        max_tokens=given and given.max_tokens,
        sampling=_sampling(given) if given else {},
        stop=tuple((given and given.stop_sequences) or ()),
        messages=tuple(messages),
        tools=tools,
        tool_choice=check_tool_choice(_tool_choice(choice) if choice else "auto", tools),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        response_schema=form.schema_ if form else None,
        response_schema_name="output_config.format" if config_form else "output_format",
        # As with Anthropic's models, only who asks for thinking gets it.
        thinking=body.thinking is not None and body.thinking.type != "disabled",
        partial=partial,
        call_id_prefix=CALL_ID_PREFIX,
    )


def _sampling(body: MessagesBody) -> dict[str, float | int | None]:
    top_p = None if body.top_p is None else max(body.top_p, MIN_TOP_P)
    return {"temperature": body.temperature, "top_p": top_p, "top_k": body.top_k}


def _split_prefill(turns: Sequence[Turn]) -> tuple[Sequence[Turn], str | None]:
    """Take off a last turn of the assistant's: the answer goes on from its text."""
    last = turns[-1]
    if last.role != "assistant":
        return turns, None
    place = f"messages.{len(turns) - 1}"
    if any(isinstance(block, ToolUseBlock) for block in last.content):
        raise ApiError(400, "the last message calls tools, and their results are missing", param=place)
    (message,) = _assistant(last, f"{place}.content")
    return turns[:-1], cast("str", message.content)


def _messages(turn: Turn, place: str) -> list[Message]:
    if turn.role == "assistant":
        return _assistant(turn, place)
    return list(_user(turn, place))


def _assistant(turn: Turn, place: str) -> list[Message]:
    text = ""
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for index, block in enumerate(turn.content):
        if isinstance(block, TextBlock):
            text += block.text
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            calls.append(ToolCall(block.id, block.name, _arguments(block.input)))
        elif not isinstance(block, RedactedThinkingBlock):
            raise _wrong_place(block.type, turn.role, f"{place}.{index}")
    return [Message("assistant", text, "".join(thoughts) or None, tuple(calls))]


def _arguments(value: Mapping[str, Any]) -> str:
    """The JSON of a call's input; or, where a client has wrapped up what was none, what the model wrote."""
    match value:
        case {"__unparsedToolInput": {"raw": str(raw)}} if len(value) == 1:  # Claude Code
            return raw
        case {"INVALID_JSON": str(raw)} if len(value) == 1:
            return raw
        case _:
            return json.dumps(value, ensure_ascii=False)


def _user(turn: Turn, place: str) -> Iterator[Message]:
    """Results become messages of their own; the text around them stays together."""
    texts: list[str] = []
    for index, block in enumerate(turn.content):
        if isinstance(block, TextBlock):
            texts.append(_without_header(block.text) if turn.role == "system" else block.text)
        elif isinstance(block, ToolResultBlock) and turn.role == "user":
            if texts:
                yield Message("user", _join(texts))
                texts = []
            yield Message("tool", _result(block), tool_call_id=block.tool_use_id)
        else:
            raise _wrong_place(block.type, turn.role, f"{place}.{index}")
    if texts:
        yield Message(turn.role, _join(texts))


def _result(block: ToolResultBlock) -> str:
    """The text of a result. What is no text is named: to refuse it would end a session that has read a picture."""
    parts = block.content or []
    text = _join(p.text if isinstance(p, TextBlock) else f"[{p.type}: this model reads text only]" for p in parts)
    return f"Error: {text}" if block.is_error else text


def _without_header(text: str) -> str:
    return BILLING_HEADER.sub("", text)


def _join(texts: Iterator[str] | Sequence[str]) -> str:
    """Blocks of a user or a system prompt are paragraphs."""
    return "\n\n".join(text for text in texts if text)


def _tool(tool: Tool, place: str) -> dict[str, Any]:
    """The tool in OpenAI's shape."""
    if tool.type not in (None, "custom"):
        raise unsupported(f"tools of type `{tool.type:.60}` are", place, "send it with a name and an `input_schema`")
    if tool.input_schema is None or not tool.name:
        raise ApiError(400, f"`{place}` has no {'`input_schema`' if tool.name else '`name`'}", param=place)
    function: dict[str, Any] = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _tool_choice(choice: ToolChoice) -> str | dict[str, str]:
    if choice.type != "tool":
        return {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    if not choice.name:
        raise ApiError(400, "`tool_choice` of type `tool` has no `name`", param="tool_choice.name")
    return {"name": choice.name}


def _wrong_place(kind: str, role: str, place: str) -> ApiError:
    if kind in ("image", "document"):
        return unsupported(f"content of type `{kind}` is", place, "this model reads text only")
    return unsupported(f"content of type `{kind:.60}` in a message of role `{role}` is", place)
