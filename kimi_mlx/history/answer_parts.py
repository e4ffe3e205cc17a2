"""The parts of an answer that is not finished: one JSON document per delta."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from kimi_mlx.history.json_text import to_json
from kimi_mlx.text.messages import Delta, Message, ToolCall, ToolCallDelta, join


def delta_to_json(delta: Delta) -> str:
    """Return a delta as JSON, without empty fields.

    Text in the place of a tool call is left out, because the deltas of the call have it.
    """
    document: dict[str, Any] = {}
    if delta.text:
        document["text"] = delta.text
    if delta.reasoning:
        document["reasoning"] = delta.reasoning
    if delta.tool_calls:
        document["calls"] = [asdict(call) for call in delta.tool_calls if isinstance(call, ToolCall)]
    if delta.tool_call_deltas:
        document["call_deltas"] = [asdict(part) for part in delta.tool_call_deltas]
    return to_json(document)


def answer_of(documents: Iterable[str]) -> tuple[Message, str]:
    """Return the message of an unfinished answer, and the tool call that the model was writing at its end.

    Args:
        documents: deltas as JSON, in order.
    """
    delta = join(_delta_from_json(document) for document in documents)
    calls = tuple(call for call in delta.tool_calls if isinstance(call, ToolCall))
    message = Message("assistant", delta.text, delta.reasoning or None, calls)
    finished_ids = {call.id for call in calls}
    unfinished = [f"{part.name} {part.arguments}" for part in delta.tool_call_deltas if part.id not in finished_ids]
    return message, "\n".join(unfinished)


def _delta_from_json(text: str) -> Delta:
    document = json.loads(text)
    return Delta(
        document.get("text", ""),
        document.get("reasoning", ""),
        tuple(ToolCall(**call) for call in document.get("calls", ())),
        tuple(ToolCallDelta(**part) for part in document.get("call_deltas", ())),
    )
