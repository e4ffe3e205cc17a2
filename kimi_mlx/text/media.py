"""Images and videos in messages, and the placeholders that a chat template writes for them.

A template writes `<|media_pad|>` for an image, and `VIDEO_PLACEHOLDER` for a video. It does not use the contents of an
image, so these are removed from the messages before they are rendered: the template, and the search for control tokens
in its input, would otherwise process megabytes of base64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from kimi_mlx.errors import ImageError
from kimi_mlx.text.messages import Message

MEDIA_BEGIN, MEDIA_CONTENT, MEDIA_END = "<|media_begin|>", "<|media_content|>", "<|media_end|>"
"""Tokens around an image: `<|media_begin|>image<|media_content|>`, its placeholders, `<|media_end|>`."""
MEDIA_PAD = "<|media_pad|>"
"""Token that a template writes once for an image; the prompt has it once for each token of the image."""
VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"
"""Text that a template writes for a video. It is not a token."""

MediaKind = Literal["image", "video"]
KINDS: Mapping[str, MediaKind] = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
"""Kinds of media by the type of a content part."""


@dataclass(frozen=True)
class Media:
    """An image or a video in a message.

    Args:
        kind: `image` or `video`.
        source: URL, or the contents of the file.
        place: location in the messages, such as `messages[2].content[0]`, for error messages.
    """

    kind: MediaKind
    source: str | bytes
    place: str


def take_media(messages: Sequence[Message]) -> tuple[list[Message], list[Media]]:
    """Return the messages without the contents of their images and videos, and the images and videos in order.

    A content part is `{"type": "image_url", "image_url": URL or {"url": URL}}`, or `image`, `video_url` or `video` in
    the place of `image_url`. Instead of a URL, a part may hold the bytes of a file.

    Args:
        messages: conversation.

    Raises:
        ImageError: a part has neither a URL nor bytes.
    """
    media: list[Media] = []
    stripped: list[Message] = []
    for index, message in enumerate(messages):
        content = message.content
        if content is not None and not isinstance(content, str):
            parts = [_take(part, f"messages[{index}].content[{number}]", media) for number, part in enumerate(content)]
            message = replace(message, content=parts)
        stripped.append(message)
    return stripped, media


def _take(part: Mapping[str, Any], place: str, media: list[Media]) -> Mapping[str, Any]:
    """Append the image or video of a content part to `media`, and return the part without its contents."""
    content_type: Any = part.get("type") if isinstance(part, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    kind = KINDS.get(content_type) if isinstance(content_type, str) else None
    if kind is None:
        return part
    key = next((key for key in (content_type, f"{kind}_url", kind) if key in part), content_type)
    value: Any = part.get(key)
    source = cast("Mapping[str, Any]", value).get("url") if isinstance(value, Mapping) else value
    if not isinstance(source, str | bytes) or not source:
        hint = f'write `{{"type": "{content_type}", "{key}": {{"url": "data:..."}}}}`'
        raise ImageError(place, f"a part of type `{content_type}` needs a URL in `{key}`", hint=hint)
    media.append(Media(kind, source, place))
    return {"type": content_type, key: kind}
