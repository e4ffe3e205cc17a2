"""Names of image and video files; checking and reading of the user's files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from kimi_mlx.errors import UsageError
from kimi_mlx.files import irregular_kind

if TYPE_CHECKING:
    from kimi_mlx.text.media import MediaKind

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi")

_WEB_URL = re.compile(r"https?:/", re.IGNORECASE)


def to_path(name: str) -> Path:
    """Return the path that a name means: a `file://` URL, or a name whose `~/` no shell has replaced."""
    if name[:7].lower() == "file://":
        try:
            url = urlsplit(name)
        except ValueError:  # such as a broken IPv6 address
            return Path(name)
        return Path(unquote(url.path)) if url.netloc.lower() in ("", "localhost") else Path(name)
    # only the user's own home folder, so that no name of a user can fail
    return Path(name).expanduser() if name.startswith("~/") else Path(name)


def media_kind(path: Path) -> MediaKind | None:
    """Return the kind of a file by its suffix; None if that is of neither an image nor a video."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "video" if suffix in VIDEO_SUFFIXES else None


def is_media_file(path: Path) -> bool:
    """Return whether a path is an existing file with the name of an image or a video."""
    return media_kind(path) is not None and os.path.isfile(path)  # unlike Path.is_file, False for any error


def check_files(paths: Iterable[Path], noun: str = "an image") -> None:
    """Check that files exist, without reading them.

    Args:
        paths: files.
        noun: name for such a file in an error.

    Raises:
        UsageError: a file does not exist, or is a folder or a device.
    """
    for path in paths:
        if _WEB_URL.match(str(path)):
            hint = "download it first, for example with `curl -O URL`"
            raise UsageError(f"{noun} is a file here, not a URL", hint=hint)
        kind = irregular_kind(path)
        if kind == "a folder":
            raise UsageError(f"`{path}` is a folder, not {noun}", hint="name a file in it")
        if kind is not None:
            raise UsageError(f"`{path}` is {kind}, not a file", hint="save its contents as a file")
        if not os.path.lexists(path):
            raise UsageError(f"there is no file `{path}`", hint=_similar_names(path))


def read_file(path: Path, max_bytes: int, noun: str = "an image") -> tuple[bytes, int]:
    """Read a file.

    Args:
        path: file.
        max_bytes: size from which the rest of the file does not matter; one more byte is read.
        noun: name for such a file in an error.

    Returns:
        the content, or its beginning, and the size of the file.

    Raises:
        UsageError: the file does not exist, is a folder or a device, or cannot be read.
    """
    check_files([path], noun)
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
            return data, max(len(data), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise UsageError(f"`{path}` cannot be read: {error.strerror}", hint="check its permissions") from error


def _similar_names(path: Path) -> str:
    """Return a hint for a file that does not exist: a file with a similar name, an image for an image."""
    is_media = media_kind(path) is not None
    try:
        names = [entry.name for entry in path.parent.iterdir() if os.path.isfile(entry)]
        names = [name for name in names if not is_media or media_kind(Path(name)) is not None]
    except OSError:
        return f"there is no folder `{path.parent}` either"
    similar = get_close_matches(path.name, names, n=1)
    return f"did you mean `{path.parent / similar[0]}`?" if similar else "check the path"
