"""Files of a message as it was entered: mentioned as `@path`, or dropped into the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_mlx.cli.chat.files.media_files import is_media_file
from kimi_mlx.cli.chat.input.dropped_files import split_dropped_files
from kimi_mlx.cli.chat.input.mentions import Mention, find_mentions
from kimi_mlx.cli.chat.input.user_input import UserInput


@dataclass(frozen=True)
class SplitMessage:
    """A message and its files.

    Attributes:
        parts: text, images and videos, in their order; a single text is exactly what was entered.
        text_files: text files that it mentions, each once; the text has their names.
        mentioned_media: images and videos that it mentions as `@path`; the others were dropped.
        missing: words with `@` that look like a path and are none.
    """

    parts: Sequence[str | Path]
    text_files: Sequence[Path]
    mentioned_media: Sequence[Path]
    missing: Sequence[str]

    @property
    def media(self) -> list[Path]:
        """Images and videos."""
        return [part for part in self.parts if isinstance(part, Path)]

    @property
    def has_text(self) -> bool:
        """Whether there is more than files: any text beside their names."""
        text = "".join(part for part in self.parts if isinstance(part, str))
        for path in self.text_files:
            text = text.replace(str(path), "")
        return bool(text.strip())


def split_message(message: UserInput) -> SplitMessage:
    """Split a message into its text and its files. Pasted blocks have no files."""
    typed = ""
    parts: list[str | Path] = []
    text_files: list[Path] = []
    mentioned_media: list[Path] = []
    missing: list[str] = []
    position = 0
    mentions = find_mentions(message)
    for start, end, found in _sorted(mentions, message.pasted):
        typed += message.text[position:start]
        position = end
        word = message.text[start:end]
        if found is None:  # a pasted block
            parts += [*_split_typed(typed), word]
            typed = ""
        elif found.is_escaped:
            typed += word[1:]
        elif not found.exists:
            typed += word
            missing.append(word)
        elif is_media_file(found.path):
            parts += [*_split_typed(typed), found.path]
            typed = ""
            mentioned_media.append(found.path)
        else:
            typed += str(found.path)
            text_files.append(found.path)
    parts += _split_typed(typed + message.text[position:])
    return SplitMessage(_join(parts), list(dict.fromkeys(text_files)), mentioned_media, missing)


def has_dropped_media(text: str) -> bool:
    """Return whether an image or a video was dropped into a text."""
    return any(isinstance(part, Path) for part in split_dropped_files(text, is_media_file))


def _sorted(mentions: Sequence[Mention], pasted: Sequence[range]) -> list[tuple[int, int, Mention | None]]:
    """Return (start, end, mention) of mentions and pasted blocks, which have none, in the order of the text."""
    blocks = [(block.start, block.stop, None) for block in pasted]
    return sorted([*((found.start, found.end, found) for found in mentions), *blocks], key=lambda span: span[:2])


def _split_typed(text: str) -> list[str | Path]:
    """Return a typed text with the images and videos that were dropped into it; without them, exactly the text."""
    parts = split_dropped_files(text, is_media_file)
    return parts if any(isinstance(part, Path) for part in parts) else [text]


def _join(parts: Sequence[str | Path]) -> list[str | Path]:
    """Join texts that follow each other; beside a file they have no spaces at their ends, and are not empty."""
    joined: list[str | Path] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    if len(joined) == 1:
        return joined
    stripped = [part.strip() if isinstance(part, str) else part for part in joined]
    return [part for part in stripped if part != ""]
