"""Write a conversation to a file: JSON in OpenAI's format, or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kimi_mlx.errors import UsageError
from kimi_mlx.files import irregular_kind, write_atomically
from kimi_mlx.history.json_text import to_json
from kimi_mlx.history.markdown import to_markdown
from kimi_mlx.history.openai_format import to_document
from kimi_mlx.history.records import ConversationRecord, MessageRecord

MARKDOWN_SUFFIXES = (".md", ".markdown")


def to_export(conversation: ConversationRecord, messages: Sequence[MessageRecord]) -> dict[str, Any]:
    """Return a conversation in OpenAI's format, with the fields of the history before its messages.

    `details` has the facts of each message after the system prompt, in the same order.
    """
    settings = messages[-1].settings if messages else {}
    document = to_document(
        [item.message for item in messages], settings.get("system"), **conversation.to_dict(), settings=settings
    )
    return {**document, "details": [item.to_dict() for item in messages]}


def export_text(conversation: ConversationRecord, messages: Sequence[MessageRecord], path: Path | None) -> str:
    """Return the text of a file: Markdown if its name ends in `.md` or `.markdown`, else JSON.

    Args:
        conversation: conversation.
        messages: its messages.
        path: file; None for standard output, which gets JSON.
    """
    if path is not None and path.suffix.lower() in MARKDOWN_SUFFIXES:
        return to_markdown(conversation, messages)
    return to_json(to_export(conversation, messages), indent=2) + "\n"


def check_target(path: Path) -> bool:
    """Return True if the file exists, so that it would be replaced.

    Raises:
        UsageError: the path cannot be written.
    """
    kind = irregular_kind(path)
    if kind is not None:
        raise UsageError(f"`{path}` is {kind}, not a file", hint="choose another name")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"there is no folder `{path.absolute().parent}`", hint="create it, or choose another name")
    return path.exists()


def write_text(path: Path, text: str) -> None:
    """Write a file; if it exists, it is replaced only when the new one is complete.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UsageError(f"`{path}` cannot be written: {error.strerror}", hint="choose another name") from error
