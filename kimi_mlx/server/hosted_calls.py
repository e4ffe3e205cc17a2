"""Hosted tool calls, which another server ran, in older messages of a conversation: the model reads them as text.

A client that switches servers in the middle of a conversation sends such calls with their results: Anthropic's
`server_tool_use` and `web_search_tool_result`, OpenAI's `web_search_call`, `local_shell_call` and others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

OWN_TYPES = ("tool_use", "tool_result", "function_call", "function_call_output")
"""Types of the client's own calls and results, which are not hosted."""

HOSTED_ENDINGS = ("_call", "_call_output", "_tool_use", "_tool_result", "_search_output")
OTHER_HOSTED_TYPES = ("compaction", "container_upload", "mcp_list_tools", "mcp_approval_request")

BOOKKEEPING = ("type", "id", "call_id", "tool_use_id", "status", "cache_control", "caller", "signature")
"""Fields that mean nothing to the model."""

MAX_DEPTH = 20
"""Maximum depth of values; deeper ones are left out. Results are not nested that deeply."""


def is_hosted(content_type: object) -> bool:
    """Return whether a type of content or of an item is that of a hosted call or its result."""
    if not isinstance(content_type, str) or content_type in OWN_TYPES:
        return False
    return content_type.endswith(HOSTED_ENDINGS) or content_type in OTHER_HOSTED_TYPES


def hosted_text(part: Mapping[str, Any]) -> str:
    """Return a hosted call or its result as text for the model, without ids and encrypted values."""
    fields = {name: _plain(value, 0) for name, value in part.items() if _is_readable(name)}
    content = next(iter(fields.values())) if len(fields) == 1 else fields
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"[{part['type']}: {text}]"


def read_hosted_parts(content: Any) -> Any:
    """Return the content of a message with each hosted call replaced by text; other content is unchanged."""
    if not isinstance(content, list):
        return content
    parts = cast("list[Any]", content)
    if not any(map(_is_hosted_part, parts)):
        return parts
    return [{"type": "text", "text": hosted_text(part)} if _is_hosted_part(part) else part for part in parts]


def _is_hosted_part(part: Any) -> bool:
    return isinstance(part, dict) and is_hosted(cast("dict[str, Any]", part).get("type"))


def _is_readable(name: str) -> bool:
    return name not in BOOKKEEPING and not name.startswith("encrypted_")


def _plain(value: Any, depth: int) -> Any:
    """Return a value without the fields that mean nothing to the model."""
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, Any]", value)
        return {name: _plain(inner, depth + 1) for name, inner in fields.items() if _is_readable(name)}
    if isinstance(value, list):
        return [_plain(inner, depth + 1) for inner in cast("Sequence[Any]", value)]
    return value
