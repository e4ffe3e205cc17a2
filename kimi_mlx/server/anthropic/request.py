"""Conversion of request bodies of Anthropic's Messages API to a ChatRequest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from kimi_mlx.server.anthropic.content_blocks import add_block, add_result_block
from kimi_mlx.server.anthropic.messages_body import (
    NO_THREADS,
    SUPPORTED,
    CountBody,
    DocumentBlock,
    ImageBlock,
    InputMessage,
    MessagesBody,
    RedactedThinkingBlock,
    SearchResultBlock,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from kimi_mlx.server.anthropic.tools import read_tools
from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.message_content import ContentBuilder
from kimi_mlx.server.request_fields import (
    MIN_TOP_P,
    Arguments,
    check_tool_choice,
    earlier_call,
    unsupported_content,
)
from kimi_mlx.server.thinking_options import thinking_fields
from kimi_mlx.text.messages import Message, ToolCall

CALL_ID_PREFIX = "toolu_"
PARAGRAPHS = "\n\n"
"""Separator of texts that the API has in separate blocks."""

# Claude Code starts its system prompt with this line. It means nothing to the model, and its number changes with each
# request, so every prompt would miss the prompt cache.
BILLING_HEADER = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n?")


def to_chat_request(body: CountBody) -> ChatRequest:
    """Return the chat request of a body.

    Raises:
        ApiError: the body is contradictory, or uses a feature that is not supported.
    """
    if body.thread is not None:
        raise ApiError(400, "`thread` is not supported: send the whole conversation without it", NO_THREADS, "thread")
    input_messages, partial = _split_prefill(body.messages)
    system = _join(_without_billing_header(block.text) for block in body.system or ())
    messages = [Message("system", system)] if system else []
    places = ["system"] if system else []
    part_places: dict[int, tuple[str, ...]] = {}
    for index, message in enumerate(input_messages):
        for converted, parts in _messages(message, f"messages[{index}].content"):
            part_places[len(messages)] = parts
            messages.append(converted)
            places.append(f"messages[{index}]")
    generation = body if isinstance(body, MessagesBody) else None
    tools = read_tools(body)
    choice = body.tool_choice
    config_format = body.output_config and body.output_config.format
    output_format = config_format or body.output_format
    return ChatRequest(
        max_tokens=generation and generation.max_tokens,
        sampling=_sampling(generation) if generation else {},
        stop=tuple((generation and generation.stop_sequences) or ()),
        messages=tuple(messages),
        places=tuple(places),
        part_places=part_places,
        tools=tools.functions,
        tool_places=tools.places,
        parameters_name="input_schema",
        tool_choice=check_tool_choice(_tool_choice(choice) if choice else "auto", tools.functions),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        response_schema=output_format.schema_ if output_format else None,
        response_schema_name=f"{'output_config.format' if config_format else 'output_format'}.schema",
        **_thinking(body),
        template_kwargs=body.chat_template_kwargs or {},
        partial=partial,
        call_id_prefix=CALL_ID_PREFIX,
        notes=tools.notes,
    )


def _thinking(body: CountBody) -> dict[str, Any]:
    """Return the fields about thinking: as with Anthropic's models, it is off unless it is requested."""
    effort = body.reasoning_effort
    fields = thinking_fields(body.thinking, effort, default=False, keeps_all=_keeps_reasoning(body))
    return fields | {"effort": fields["effort"] or (body.output_config and body.output_config.effort)}


def _keeps_reasoning(body: CountBody) -> bool:
    edits = (body.context_management and body.context_management.edits) or ()
    return any(edit.keeps_reasoning for edit in edits)


def _sampling(body: MessagesBody) -> dict[str, float | int | None]:
    top_p = None if body.top_p is None else max(body.top_p, MIN_TOP_P)
    return {"temperature": body.temperature, "top_p": top_p, "top_k": body.top_k}


def _split_prefill(messages: Sequence[InputMessage]) -> tuple[Sequence[InputMessage], str | None]:
    """Split off the text of the last message if it is the assistant's: the answer continues it."""
    last = messages[-1]
    if last.role != "assistant":
        return messages, None
    location = f"messages[{len(messages) - 1}]"
    if any(isinstance(block, ToolUseBlock) for block in last.content):
        raise ApiError(400, "the last message calls tools, but their results are missing", param=location)
    return messages[:-1], cast("str", _assistant(last, f"{location}.content").content)


def _messages(message: InputMessage, location: str) -> Iterator[tuple[Message, tuple[str, ...]]]:
    """Yield the messages that the blocks of one message become, with the locations of the parts of their contents."""
    if message.role == "assistant":
        yield _assistant(message, location), ()
    else:
        yield from _user(message, location)


def _assistant(message: InputMessage, location: str) -> Message:
    text = ""
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for index, block in enumerate(message.content):
        if isinstance(block, TextBlock):
            text += block.text
        elif isinstance(block, ThinkingBlock):
            reasoning.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            calls.append(earlier_call(block.id, block.name, _unwrap(block.input)))
        elif not isinstance(block, RedactedThinkingBlock):
            raise unsupported_content(block.type, f"{location}[{index}].type", SUPPORTED[message.role], message.role)
    return Message("assistant", text, "".join(reasoning) or None, tuple(calls))


def _unwrap(value: Arguments) -> Arguments:
    """Return the arguments of a call; their text, if the client wrapped invalid JSON in an object."""
    match value:
        case {"__unparsedToolInput": {"raw": str(raw)}} if len(value) == 1:  # Claude Code
            return raw
        case {"INVALID_JSON": str(raw)} if len(value) == 1:
            return raw
        case _:
            return value


def _user(message: InputMessage, location: str) -> Iterator[tuple[Message, tuple[str, ...]]]:
    """Yield a message for each tool result, and one for each run of other blocks between them."""
    content = ContentBuilder(PARAGRAPHS)
    for index, block in enumerate(message.content):
        place = f"{location}[{index}]"
        if isinstance(block, TextBlock) and message.role == "system":
            content.add_text(_without_billing_header(block.text))
        elif isinstance(block, TextBlock | ImageBlock | DocumentBlock | SearchResultBlock) and message.role == "user":
            add_block(content, block, place)
        elif isinstance(block, ToolResultBlock) and message.role == "user":
            if not content.is_empty:
                built, part_places = content.build()
                yield Message("user", built), part_places
                content = ContentBuilder(PARAGRAPHS)
            built, part_places = _result(block, f"{place}.content").build()
            yield Message("tool", built, tool_call_id=block.tool_use_id), part_places
        else:
            raise unsupported_content(block.type, f"{place}.type", SUPPORTED[message.role], message.role)
    if not content.is_empty:
        built, part_places = content.build()
        yield Message(message.role, built), part_places


def _result(block: ToolResultBlock, location: str) -> ContentBuilder:
    """Return the content of a tool's result."""
    content = ContentBuilder(PARAGRAPHS, prefix="Error: " if block.is_error else "")
    for index, part in enumerate(block.content or ()):
        add_result_block(content, part, f"{location}[{index}]")
    return content


def _without_billing_header(text: str) -> str:
    return BILLING_HEADER.sub("", text)


def _join(texts: Iterator[str] | Sequence[str]) -> str:
    """Join blocks of the system prompt as paragraphs."""
    return PARAGRAPHS.join(text for text in texts if text)


def _tool_choice(choice: ToolChoice) -> str | dict[str, str]:
    if choice.type != "tool":
        return {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    if not choice.name:
        raise ApiError(400, "`tool_choice` of type `tool` has no `name`", param="tool_choice.name")
    return {"name": choice.name}
