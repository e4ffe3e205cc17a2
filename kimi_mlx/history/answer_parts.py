"""The deltas of an unfinished answer: one JSON document each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from kimi_mlx.history.json_text import to_json
from kimi_mlx.text.messages import Delta, Message, ToolCallDelta, join


def delta_to_json(delta: Delta) -> str:
    """Return a delta as JSON, without empty fields. Complete tool calls are left out: their deltas have all of them."""
    document: dict[str, Any] = {}
    if delta.text:
        document["text"] = delta.text
    if delta.reasoning:
        document["reasoning"] = delta.reasoning
    if delta.tool_call_deltas:
        document["call_deltas"] = [asdict(part) for part in delta.tool_call_deltas]
    return to_json(document)


def answer_of(documents: Iterable[str]) -> tuple[Message, str]:
    """Return the message of an unfinished answer, and its tool calls as text, since they were not run.

    Args:
        documents: deltas as JSON, in order.
    """
    delta = join(_delta_from_json(document) for document in documents)
    calls = [f"{part.name} {part.arguments}" for part in delta.tool_call_deltas]
    return Message("assistant", delta.text, delta.reasoning or None), "\n".join(calls)


def _delta_from_json(text: str) -> Delta:
    document = json.loads(text)
    return Delta(
        document.get("text", ""),
        document.get("reasoning", ""),
        tool_call_deltas=tuple(ToolCallDelta(**part) for part in document.get("call_deltas", ())),
    )
