"""A conversation as Markdown, for people to read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from textwrap import indent

from kimi_mlx.history.plain_text import content_text
from kimi_mlx.history.records import ConversationRecord, MessageRecord
from kimi_mlx.text.messages import ToolCall

UNFINISHED = "*[unfinished: the chat ended before the answer did]*"


def to_markdown(conversation: ConversationRecord, messages: Sequence[MessageRecord]) -> str:
    """Return a conversation as Markdown: a heading for each message, reasoning as a quotation, tool calls as code.

    Args:
        conversation: conversation.
        messages: its messages; removed ones are marked.
    """
    title = conversation.title or "Conversation"
    facts = f"{conversation.id} · {format_time(conversation.created_s)} · {conversation.model}"
    blocks = [f"# {title}", f"*{facts}*"]
    system = None
    for record in messages:
        if record.settings.get("system") != system:
            system = record.settings.get("system")
            blocks += ["## System", str(system) if system else "*[no system prompt]*"]
        blocks += _message_blocks(record)
    return "\n\n".join(blocks) + "\n"


def format_time(seconds: float) -> str:
    """Return a time in the user's time zone, such as `2026-11-29 15:04`."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _message_blocks(record: MessageRecord) -> list[str]:
    message = record.message
    if message.role == "tool":
        return [
            f"**result of {message.name or message.tool_call_id or 'the tool'}**",
            _fence(content_text(message.content)),
        ]
    names = {"user": "You", "system": "System", "assistant": record.model}
    blocks = [f"## {names[message.role]}" + (" (removed)" if record.removed_s is not None else "")]
    if message.reasoning_content:
        blocks.append(indent(message.reasoning_content.strip(), "> ", lambda line: True))
    if text := content_text(message.content).strip("\n"):
        blocks.append(text)
    for call in message.tool_calls:
        blocks += [f"**tool call {call.name}**", _fence(_format_arguments(call), "json")]
    if record.unfinished_calls:
        blocks += ["**unfinished tool calls**", _fence(record.unfinished_calls)]
    if record.is_unfinished:
        blocks.append(UNFINISHED)
    return blocks


def _format_arguments(call: ToolCall) -> str:
    try:
        return json.dumps(json.loads(call.arguments), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return call.arguments


def _fence(text: str, language: str = "") -> str:
    """Return text as a code block, with a fence longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
