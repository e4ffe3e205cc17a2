"""Content of a message, assembled from the parts that an API sends, in the form of OpenAI's API.

It is a text, or, if there are images or videos, a list of parts: `{"type": "text", "text": ...}`,
`{"type": "image_url", "image_url": {"url": ...}}` and `{"type": "video_url", "video_url": {"url": ...}}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kimi_mlx.text.messages import Content

MediaType = Literal["image_url", "video_url"]


@dataclass(frozen=True)
class RemoteUrl:
    """The URL of an image or a video of a request that is not in the request itself.

    Args:
        url: URL, as it was sent.
        place: location of the image in the body, for error messages.
    """

    url: str
    place: str


class MissingMediaError(Exception):
    """A request cannot be prepared before these URLs have been fetched."""

    def __init__(self, urls: tuple[RemoteUrl, ...]):
        super().__init__(urls)
        self.urls = urls


class ContentBuilder:
    """Assembles the content of one message.

    Args:
        separator: text between two texts that follow each other.
        prefix: text before everything else.
    """

    def __init__(self, separator: str = "", prefix: str = ""):
        self._separator, self._prefix = separator, prefix
        self._texts: list[str] = []  # since the last image
        self._parts: list[Mapping[str, Any]] = []
        self._places: list[str] = []

    def add_text(self, text: str) -> None:
        """Append a text."""
        self._texts.append(text)

    def add_media(self, media_type: MediaType, url: str, place: str) -> None:
        """Append an image or a video.

        Args:
            media_type: type of the part.
            url: data URL, or a URL to fetch.
            place: location of the part in the body.
        """
        self._end_text()
        self._parts.append({"type": media_type, media_type: {"url": url}})
        self._places.append(place)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added."""
        return not self._texts and not self._parts

    def build(self) -> tuple[Content, tuple[str, ...]]:
        """Return the content, and the locations of its parts if it is a list; those of texts are empty."""
        if not self._places:
            return self._text(), ()
        self._end_text()
        return tuple(self._parts), tuple(self._places)

    def _text(self) -> str:
        return self._prefix + self._separator.join(filter(None, self._texts))

    def _end_text(self) -> None:
        if text := self._text():
            self._parts.append({"type": "text", "text": text})
            self._places.append("")
        self._prefix, self._texts = "", []


def texts_of(content: Content) -> list[str]:
    """Return the texts of a content."""
    if content is None or isinstance(content, str):
        return [content or ""]
    return [part["text"] for part in content if part["type"] == "text"]
