"""Text files that the user adds to a message: read, counted in tokens, and compared with the context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_mlx.cli.chat.files.text_files import as_message_part, read_text_file
from kimi_mlx.cli.output import slow_status
from kimi_mlx.errors import UsageError
from kimi_mlx.session.chat_model import ChatModel, ChatOptions
from kimi_mlx.text.messages import Message
from kimi_mlx.units import format_bytes


@dataclass(frozen=True, eq=False)
class TextAttachment:
    """A text file of a message.

    Attributes:
        name: name of the file, without control characters.
        size: size of the file, with its encoding if that is not UTF-8.
        part: part of a message in OpenAI's format: the name and the text, in a code fence.
        num_tokens: number of tokens in the prompt.
    """

    name: str
    size: str
    part: Mapping[str, Any] = field(repr=False)
    num_tokens: int

    def __str__(self) -> str:
        """Describe the file in one line."""
        return f"{self.name} · {self.size} · {self.num_tokens:,} tokens"


def read_text_attachment(path: Path, model: ChatModel, options: ChatOptions, num_used: int) -> TextAttachment:
    """Read a text file for a message.

    Args:
        path: file.
        model: model that will read it.
        options: options of the conversation.
        num_used: number of tokens of the context that are in use.

    Raises:
        UsageError: it cannot be read, is not text, or does not fit into the context.
        KimiMlxError: the server that counts tokens does not answer.
    """
    with slow_status() as set_status:
        set_status(f"reading {path.name}")
        file = read_text_file(path)
        text = as_message_part(file) + "\n\n"
        num_tokens = model.count_tokens([Message("user", text)], options)
        num_tokens -= model.count_tokens([Message("user", "")], options)
    if model.context and num_tokens + num_used > model.context:
        used = f", of which {num_used:,} are in use" if num_used else ""
        raise UsageError(
            f"`{path}` has {num_tokens:,} tokens, and the context has {model.context:,}{used}",
            hint="attach a part of it, or type /clear for a new conversation" if used else "attach a part of it",
        )
    size = format_bytes(file.num_bytes) + ("" if file.encoding == "UTF-8" else f", {file.encoding}")
    return TextAttachment(file.name, size, {"type": "text", "text": text}, num_tokens)
