"""Conversion of the request body of OpenAI's Responses API to a ChatRequest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import parse, parse_json
from kimi_mlx.server.openai.responses_body import (
    ContinuedBody,
    ConversationBody,
    Item,
    ItemReference,
    ResponsesBody,
    StoredTurn,
    TextFormat,
)
from kimi_mlx.server.openai.responses_conversation import ConversationBuilder
from kimi_mlx.server.openai.responses_tools import build_table, choose, found_tools
from kimi_mlx.server.openai.tool_table import ToolTable
from kimi_mlx.server.request_fields import MIN_TOP_P, unsupported
from kimi_mlx.server.thinking_options import thinking_fields

EARLIER = "previous_response_id"


class MissingStateError(Exception):
    """A request cannot be read before stored responses have been added to it.

    Args:
        previous_response_id: id of the response that the request follows.
        item_ids: ids of the items to which it refers.
    """

    def __init__(self, previous_response_id: str | None, item_ids: tuple[str, ...]):
        super().__init__(previous_response_id, item_ids)
        self.previous_response_id, self.item_ids = previous_response_id, item_ids


@dataclass(frozen=True)
class ParsedState:
    """The stored responses that a request continues, parsed from a StoredState.

    Args:
        history: stored responses before the request, the oldest first.
        references: items of stored responses by id.
    """

    history: Sequence[StoredTurn] = ()
    references: Mapping[str, Item] = field(default_factory=dict[str, Item])

    def items(self, body: ConversationBody) -> list[Item]:
        """Return all items of the conversation, without references."""
        listed = [item for turn in self.history for item in (*(turn.request.input or ()), *turn.output)]
        return [self._resolve(item) for item in (*listed, *(body.input or ()))]

    def _resolve(self, item: Item) -> Item:
        return self.references[item.id] if isinstance(item, ItemReference) else item


NO_STATE = ParsedState()


def read_body(model: type[ResponsesBody], data: bytes) -> ResponsesBody:
    """Parse a body that does not continue stored responses.

    Raises:
        ApiError: the body is invalid.
        MissingStateError: the body continues stored responses.
    """
    body = parse(model, data)
    _check_input(body)
    ids = tuple(dict.fromkeys(item.id for item in body.input or () if isinstance(item, ItemReference)))
    if body.previous_response_id is not None or ids:
        raise MissingStateError(body.previous_response_id, ids)
    return body


def read_continued_body(model: type[ResponsesBody], data: bytes) -> tuple[ResponsesBody, ParsedState]:
    """Parse a body together with the stored responses that it continues, which `StoredState.continued_body` has added.

    Raises:
        ApiError: the body is invalid.
    """
    continued = parse(ContinuedBody, data)
    body = model.model_validate(continued.request)
    return body, ParsedState(continued.history, continued.items)


def to_kept_request(data: bytes, *, is_continued: bool) -> bytes:
    """Return what of a body counts for later requests: the JSON text of a StoredRequest, in UTF-8.

    Tools and instructions are left out, so that a conversation of many turns does not contain them many times.

    Args:
        data: valid body.
        is_continued: whether `StoredState.continued_body` has extended it.
    """
    value: dict[str, Any] = parse_json(data)
    body = value["request"] if is_continued else value
    return json.dumps({"input": body.get("input")}, ensure_ascii=False, separators=(",", ":")).encode()


def _check_input(body: ConversationBody) -> None:
    if not body.input and body.previous_response_id is None:
        problem = "required field is missing" if body.input is None else "has 0 items, but at least 1 are required"
        code = "missing_required_parameter" if body.input is None else "invalid_value"
        raise ApiError(400, f"`input`: {problem}", code, "input")


def read_tools(body: ConversationBody, state: ParsedState = NO_STATE) -> ToolTable:
    """Return the tools of a body, and those that tool searches in its conversation have found.

    Raises:
        ApiError: a tool is invalid.
    """
    return build_table(body.tools or (), found_tools(state.items(body)))


def to_chat_request(body: ResponsesBody, state: ParsedState = NO_STATE, table: ToolTable | None = None) -> ChatRequest:
    """Return the chat request of a body.

    Args:
        body: body.
        state: stored responses that it continues.
        table: its tools; None to read them.

    Raises:
        ApiError: the body uses a feature that is not supported.
    """
    _refuse_unsupported(body)
    table = table or read_tools(body, state)
    conversation = read_conversation(body, state, table)
    tool_choice = choose(table, body.tool_choice)
    top_p = None if body.top_p is None else max(body.top_p, MIN_TOP_P)
    return ChatRequest(
        max_tokens=body.max_output_tokens,
        sampling={
            "temperature": body.temperature,
            "top_p": top_p,
            "frequency_penalty": body.frequency_penalty,
            "presence_penalty": body.presence_penalty,
            "repetition_penalty": body.repetition_penalty,
        },
        top_logprobs=_top_logprobs(body),
        messages=tuple(conversation.messages),
        messages_name="input",
        places=tuple(conversation.places),
        part_places=conversation.part_places,
        tools=tuple(table.functions),
        tool_places=table.places,
        parameters_name="parameters",
        tool_choice=tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_schema=_response_schema(body.text and body.text.format),
        response_schema_name="text.format.schema",
        input_rules=table.rules,
        notes=table.notes,
        template_kwargs=body.chat_template_kwargs or {},
        **thinking_fields(body.thinking, (body.reasoning and body.reasoning.effort) or body.reasoning_effort),
    )


def read_conversation(body: ConversationBody, state: ParsedState, table: ToolTable) -> ConversationBuilder:
    """Return the messages of a body and of the responses before it, without the instructions of those.

    Raises:
        ApiError: an item has content that the model cannot have.
    """
    conversation = ConversationBuilder(body.instructions, table)
    for turn in state.history:
        conversation.add_items(turn.request.input or (), EARLIER, state.references)
        conversation.add_items(turn.output, EARLIER, state.references)
    conversation.add_items(body.input or (), "input[{}]", state.references)
    conversation.end()
    return conversation


def _refuse_unsupported(body: ConversationBody) -> None:
    """Refuse requests that refer to prompts and conversations stored at OpenAI."""
    if body.conversation is not None:
        raise unsupported("`conversation` is", "conversation", "use `previous_response_id`, or send all of `input`")
    if body.prompt is not None:
        raise unsupported("`prompt` is", "prompt", "no prompts are stored; send `instructions` and `input`")


def _response_schema(text_format: TextFormat | None) -> dict[str, Any] | bool | None:
    if text_format is None or text_format.type == "text":
        return None
    if text_format.type == "json_object":
        return True
    if text_format.schema_ is None:
        raise ApiError(400, "`text.format` has no `schema`", "missing_required_parameter", "text.format.schema")
    return text_format.schema_


def _top_logprobs(body: ResponsesBody) -> int | None:
    is_included = "message.output_text.logprobs" in (body.include or ())
    return body.top_logprobs or 0 if is_included or body.top_logprobs else None
