"""Results of tools, as text and images for the model."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kimi_mlx.units import format_bytes

if TYPE_CHECKING:
    from mcp_types import CallToolResult

HEAD_SHARE = 0.75
"""Share of a shortened text that is its beginning; the rest is its end, where programs write their errors."""

MAX_TRIES = 6
"""Maximum number of times that a text is shortened further."""


@dataclass(frozen=True)
class ToolResult:
    """Result of a tool call.

    Attributes:
        text: text for the model.
        is_error: whether the call failed.
        images: contents of image files, which follow the text.
    """

    text: str
    is_error: bool = False
    images: tuple[bytes, ...] = ()

    @property
    def content(self) -> str:
        """Text, with `Error: ` before that of a failed call: a tool message has no field for it."""
        return f"Error: {self.text}" if self.is_error else self.text


def from_mcp(result: CallToolResult) -> ToolResult:
    """Return a result of the SDK. Content that the model cannot read is named in a line of text."""
    texts: list[str] = []
    images: list[bytes] = []
    for block in result.content:
        text, image = _read_block(block.model_dump(mode="json", by_alias=True))
        texts += [text] if text else []
        images += [image] if image is not None else []
    if not texts and not images and result.structured_content is not None:
        texts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return ToolResult("\n".join(texts) or ("" if images else "(no output)"), result.is_error, tuple(images))


def _read_block(block: dict[str, Any]) -> tuple[str, bytes | None]:
    """Return the text and the image of a content block."""
    kind = block["type"]
    if kind == "text":
        return block["text"], None
    if kind == "image":
        try:
            return "", base64.b64decode(block["data"], validate=True)
        except (binascii.Error, ValueError):
            return "[an image that is not valid base64]", None
    if kind == "audio":
        return f"[audio, {block['mimeType']}, which the model cannot hear]", None
    if kind == "resource_link":
        return f"[resource {block['uri']}: {block.get('description') or block.get('name') or ''}]", None
    resource = block["resource"]
    if "text" in resource:
        return resource["text"], None
    size = format_bytes(len(resource.get("blob", "")) * 3 // 4)
    return f"[resource {resource['uri']}, {resource.get('mimeType') or 'binary'}, {size}, not shown]", None


def shorten(text: str, max_tokens: int, count: Callable[[str], int]) -> str:
    """Return a text of at most max_tokens: its beginning and its end, and between them a note for the model.

    Args:
        text: text of any length.
        max_tokens: maximum number of tokens.
        count: function that returns the number of tokens of a text.
    """
    bound = 16 * max_tokens  # characters; no text needs fewer tokens, apart from repetitions
    num_chars = min(len(text), bound)
    shown = text if num_chars == len(text) else _cut(text, num_chars)
    for _ in range(MAX_TRIES):
        num_tokens = count(shown)
        if num_tokens <= max_tokens:
            return shown
        num_chars = int(num_chars * 0.9 * max_tokens / num_tokens)
        shown = _cut(text, num_chars)
    return _cut(text, 0)


def _cut(text: str, num_chars: int) -> str:
    head = int(num_chars * HEAD_SHARE)
    tail = num_chars - head
    omitted = len(text) - num_chars
    note = f"[{omitted:,} of {len(text):,} characters left out here: too long for the context; ask for less at a time]"
    return "\n".join(part for part in (text[:head], note, text[len(text) - tail :]) if part)


def parse_arguments(arguments: str) -> dict[str, Any]:
    """Return the arguments of a call.

    Raises:
        ValueError: they are not a JSON object.
    """
    try:
        value = json.loads(arguments or "{}")
    except RecursionError as error:
        raise ValueError("they are nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("they are not an object")
    return value


def join_lines(lines: Sequence[str]) -> str:
    """Return lines as one text, each indented."""
    return "".join(f"\n  {line}" for line in lines)
