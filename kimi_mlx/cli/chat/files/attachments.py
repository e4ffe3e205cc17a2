"""Images and videos that the user adds to a message: read from files, checked, and described."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.text import Text

from kimi_mlx.cli.chat.files.media_files import read_file
from kimi_mlx.cli.chat.files.text_attachments import TextAttachment
from kimi_mlx.cli.chat.output.terminal_text import to_line
from kimi_mlx.cli.chat.output.thumbnail import find_graphics_protocol, first_frame, thumbnail_sequence
from kimi_mlx.cli.output import escape_controls, slow_status, stderr
from kimi_mlx.errors import ImageError
from kimi_mlx.text.media import MediaKind
from kimi_mlx.units import format_count

if TYPE_CHECKING:
    from kimi_mlx.images.prepared import PreparedImage
    from kimi_mlx.images.video import MediaChunk
    from kimi_mlx.text.messages import Content


PrepareMedia: TypeAlias = "Callable[[MediaKind, bytes, str], Sequence[MediaChunk]]"
"""Function that decodes an image or a video: its kind, its contents, and its name for error messages."""


@dataclass(frozen=True, eq=False)
class Attachment:
    """An image or a video of a message.

    Attributes:
        name: name of the file, without control characters.
        kind: image or video.
        part: part of a message in OpenAI's format, with the contents of the file in the place of a URL.
        frames: the image, or the chunks of a video, as the model sees them.
    """

    name: str
    kind: MediaKind
    part: Mapping[str, Any] = field(repr=False)
    frames: tuple[PreparedImage, ...] = field(repr=False)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the prompt, without the text around them."""
        return sum(chunk.num_tokens for chunk in self.frames)

    @property
    def size(self) -> str:
        """Width and height in pixels, and for a video the number of frames that the model sees."""
        width, height = self.frames[0].size
        num_frames = sum(chunk.grid[0] for chunk in self.frames)
        return f"{width}x{height}" + (f", {format_count(num_frames, 'frame')}" if self.kind == "video" else "")

    def __str__(self) -> str:
        """Describe the file in one line."""
        return f"{self.name} · {self.size} · {self.num_tokens} tokens"


def read_attachment(
    path: Path, kind: MediaKind, prepare: PrepareMedia | None = None, is_quiet: bool = False
) -> Attachment:
    """Read an image or a video.

    Args:
        path: file; its name may have any ending.
        kind: image or video.
        prepare: function that decodes the file for a model; None decodes it for K2.5.
        is_quiet: whether to show no status if it takes long.

    Raises:
        UsageError: the file does not exist, is a folder, or cannot be read.
        ImageError: the file is too large, broken or of an unknown format, or an extra is not installed.
    """
    # heavy imports: only for a message with images
    from kimi_mlx.images.cache import MediaCache
    from kimi_mlx.images.data_url import too_large
    from kimi_mlx.images.limits import DEFAULT_LIMITS
    from kimi_mlx.images.other_formats import VIDEO, find_other_format

    place = escape_controls(str(path))
    name = to_line(path.name)
    max_bytes = DEFAULT_LIMITS.max_bytes if kind == "image" else DEFAULT_LIMITS.max_video_bytes
    data, num_bytes = read_file(path, max_bytes)
    if kind == "image" and find_other_format(data) is VIDEO:
        raise ImageError(place, "it is a video, not an image", hint="use `--video`, or `/video` in a conversation")
    if len(data) > max_bytes:
        raise too_large(place, num_bytes, max_bytes)
    with slow_status(is_quiet) as set_status:
        set_status(f"reading {name}")
        chunks = (prepare or MediaCache().prepare)(kind, data, place)
    return Attachment(name, kind, {"type": kind, kind: data}, tuple(chunk.image for chunk in chunks))


def show_attachment(attachment: Attachment | TextAttachment) -> None:
    """Show name, size and tokens, and of an image a thumbnail, if the terminal can."""
    protocol = find_graphics_protocol(os.environ, is_terminal=stderr.is_terminal)
    if protocol is not None and isinstance(attachment, Attachment):
        sequence = thumbnail_sequence(first_frame(attachment.frames[0]), protocol, stderr.width)
        stderr.file.write(sequence + "\n")
        stderr.file.flush()
    stderr.print(Text(str(attachment), style="dim"), soft_wrap=False)


def with_attachments(content: Content, attachments: Sequence[Attachment | TextAttachment]) -> Content:
    """Return a message with files before its text."""
    if not attachments:
        return content
    parts = [text_part(content)] if isinstance(content, str) else content or ()
    return [*(attachment.part for attachment in attachments), *parts]


def text_part(text: str) -> Mapping[str, Any]:
    """Return text as a part of a message in OpenAI's format."""
    return {"type": "text", "text": text}
