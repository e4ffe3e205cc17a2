"""The text of messages, for titles of conversations and for the search."""

from __future__ import annotations

import re

from kimi_mlx.text.media import KINDS
from kimi_mlx.text.messages import Content, Message

MAX_TITLE = 60
"""Number of characters of a title that is made from a message."""

_QUOTED_FILES = re.compile(r"(?:File: [^\n]*\n(`{3,})\n(?:.*?\n)?\1(?:\n\n|\Z))+", re.DOTALL)
"""Text files as `chat -p` quotes them before the prompt, in one text with it."""


def content_text(content: Content) -> str:
    """Return the text of a message's content; an image is `[image]`."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [
        part.get("text") if "text" in part else f"[{KINDS.get(str(part.get('type')), 'file')}]" for part in content
    ]
    return "\n".join(part for part in parts if isinstance(part, str))


def has_content(message: Message) -> bool:
    """Return whether a message has text, files, reasoning or tool calls."""
    return bool(message.content or message.reasoning_content or message.tool_calls)


def message_text(message: Message) -> str:
    """Return all text of a message: content, reasoning and tool calls."""
    calls = [f"{call.name} {call.arguments}" for call in message.tool_calls]
    return "\n".join(part for part in (message.reasoning_content, content_text(message.content), *calls) if part)


def title_of(content: Content) -> str:
    """Return a title for a conversation from its first message: the first words, in one line.

    Of a message with files these are the words after the last file, where the user has typed them.
    """
    parts = [content] if content is None or isinstance(content, str) else [[part] for part in content]
    texts = [content_text(part) for part in parts if isinstance(part, str | None) or "text" in part[0]]
    text = next((text for text in reversed(texts) if text.strip()), content_text(content))
    quoted = _QUOTED_FILES.match(text)
    words = (text[quoted.end() :] if quoted else "").split() or text.split()
    title = ""
    for word in words:
        if title and len(title) + 1 + len(word) > MAX_TITLE:
            return f"{title} ..."
        title = f"{title} {word}".strip()
    return title if len(title) <= MAX_TITLE else f"{title[:MAX_TITLE]} ..."
