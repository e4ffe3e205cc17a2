"""Results of tools as messages: within the context, and with images where the model sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kimi_mlx.errors import ImageError, KimiMlxError
from kimi_mlx.session.chat_model import ChatOptions
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.text.messages import Content, Message
from kimi_mlx.tools.results import ToolResult, shorten

MAX_RESULT_TOKENS = 25_000
"""Maximum number of tokens of a result."""

MIN_RESULT_TOKENS = 256
"""Size that every result may have, even in a full context, so that the error of the full context is the model's."""

CONTEXT_SHARE = 0.5
"""Share of the remaining context that the results of one round may take together."""

SHORT_CHARS = 800
"""Number of characters up to which a result is not counted."""

CHARS_PER_TOKEN = 3
"""Estimate for a model that cannot count: its server has failed, and the next answer reports that."""

MAX_IMAGES = 8
"""Maximum number of images of a result."""


def message_content(conversation: Conversation, result: ToolResult, num_results: int) -> Content:
    """Return the content of the message with a result.

    Args:
        conversation: conversation that the result belongs to.
        result: result of a tool.
        num_results: number of results of the same round, which share what is left of the context.
    """
    images, notes = _read_images(conversation, result)
    text = "\n".join(part for part in (result.content, *notes) if part)
    if len(text) > SHORT_CHARS:
        text = shorten(text, _max_tokens(conversation, num_results), _token_counter(conversation))
    return [{"type": "text", "text": text}, *images] if images else text


def _max_tokens(conversation: Conversation, num_results: int) -> int:
    """Return the maximum number of tokens of a result."""
    try:
        remaining = conversation.model.context - conversation.count_tokens()
    except KimiMlxError:
        remaining = conversation.model.context
    return max(MIN_RESULT_TOKENS, min(MAX_RESULT_TOKENS, int(CONTEXT_SHARE * remaining / num_results)))


def _token_counter(conversation: Conversation) -> Callable[[str], int]:
    """Return a function that returns the number of tokens of a text."""

    def count(text: str) -> int:
        try:
            return conversation.model.count_tokens([Message("user", text)], ChatOptions())
        except KimiMlxError:
            return len(text) // CHARS_PER_TOKEN

    return count


def _read_images(conversation: Conversation, result: ToolResult) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Return the images that the model can see, as parts of a message, and a note for each other one."""
    model = conversation.model
    if result.images and model.image_error is not None:
        return [], ["[an image, which the model cannot see]"] * len(result.images)
    parts: list[Mapping[str, Any]] = []
    notes: list[str] = []
    for number, image in enumerate(result.images, 1):
        place = f"image {number} of the result"
        try:
            if number > MAX_IMAGES:
                raise ImageError(place, f"a result has at most {MAX_IMAGES} images")
            model.prepare_media("image", image, place)
        except ImageError as error:
            notes.append(f"[{error.message}]")
        else:
            parts.append({"type": "image", "image": image})
    return parts, notes
