"""Thumbnails in the terminal, by kitty's graphics protocol or iTerm2's inline images.

Sources: https://sw.kovidgoyal.net/kitty/graphics-protocol/ and https://iterm2.com/documentation-images.html.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from PIL.Image import Image

    from kimi_mlx.images.prepared import PreparedImage

GraphicsProtocol: TypeAlias = Literal["kitty", "iterm2"]

MAX_WIDTH, MAX_HEIGHT = 320, 160
"""Maximum size of a thumbnail in pixels: at most 154 kB, 205 kB in base64."""

CELL_WIDTH, CELL_HEIGHT = 10, 20
"""Assumed size of a character in pixels. Terminals scale a thumbnail to the characters that it asks for."""

KITTY_CHUNK = 4096
"""Maximum number of base64 characters in one of kitty's escape sequences."""

_KITTY_TERMS = ("xterm-kitty", "xterm-ghostty")
_PROGRAMS: Mapping[str, GraphicsProtocol] = {"iTerm.app": "iterm2", "WezTerm": "iterm2", "ghostty": "kitty"}
_MULTIPLEXERS = ("TMUX", "STY", "ZELLIJ")


def find_graphics_protocol(environment: Mapping[str, str], *, is_terminal: bool) -> GraphicsProtocol | None:
    """Return the protocol that the terminal has, by its environment variables; None for none.

    Terminals inside another program (tmux, screen, Zellij) show no images.

    Args:
        environment: environment variables.
        is_terminal: whether the output is a terminal.
    """
    term, program = environment.get("TERM", "").lower(), environment.get("TERM_PROGRAM", "")
    if not is_terminal or term in ("", "dumb", "unknown") or term.startswith(("screen", "tmux")):
        return None
    if any(environment.get(name) for name in _MULTIPLEXERS):
        return None
    if term in _KITTY_TERMS:
        return "kitty"
    if program:  # set by the terminal itself; the variables below may be inherited from another one
        return _PROGRAMS.get(program)
    if environment.get("KITTY_WINDOW_ID"):
        return "kitty"
    return "iterm2" if environment.get("LC_TERMINAL") == "iTerm2" else None


def first_frame(image: PreparedImage) -> Image:
    """Return an image, or the first frame of a chunk, from its patches, without their padding."""
    from PIL.Image import fromarray

    from kimi_mlx.images.resize import PATCH_SIZE

    _, rows, columns = image.grid
    all_patches: Any = image.patches
    patches = all_patches[: rows * columns].reshape(rows, columns, 3, PATCH_SIZE, PATCH_SIZE)
    height, width = rows * PATCH_SIZE, columns * PATCH_SIZE
    pixels = patches.transpose(0, 3, 1, 4, 2).reshape(height, width, 3)  # (rows, y, columns, x, 3) -> an image
    # padding is right and below; if the image was shrunk, by a factor that is not known exactly, some of it stays
    scale = min(1.0, width / image.size[0], height / image.size[1])
    unpadded_width, unpadded_height = (max(1, int(side * scale)) for side in image.size)
    return fromarray(pixels).crop((0, 0, unpadded_width, unpadded_height))


def thumbnail_sequence(image: Image, protocol: GraphicsProtocol, columns: int) -> str:
    """Return the escape sequences that show an image as a thumbnail, without a newline behind them.

    The terminal receives a PNG that is encoded here, never the bytes of a file.

    Args:
        image: image of any size.
        protocol: protocol of the terminal.
        columns: width of the terminal in characters.
    """
    thumbnail = image.convert("RGB")
    max_width = max(CELL_WIDTH, min(MAX_WIDTH, CELL_WIDTH * (columns - 2)))
    thumbnail.thumbnail((max_width, MAX_HEIGHT))
    width, height = thumbnail.size
    encoded = io.BytesIO()
    thumbnail.save(encoded, "PNG")
    data = base64.b64encode(encoded.getvalue()).decode()
    # one of both numbers, so that the terminal keeps the shape whatever its characters measure
    is_wide = width * MAX_HEIGHT >= height * max_width
    size = math.ceil(width / CELL_WIDTH) if is_wide else math.ceil(height / CELL_HEIGHT)
    if protocol == "iterm2":
        axis = "width" if is_wide else "height"
        length = len(encoded.getvalue())
        return f"\x1b]1337;File=inline=1;size={length};{axis}={size};preserveAspectRatio=1:{data}\x07"
    return _kitty_sequences(data, f"{'c' if is_wide else 'r'}={size}")


def _kitty_sequences(data: str, size: str) -> str:
    """Return the sequences for a PNG in base64; q=2 keeps the terminal from answering into the input."""
    chunks = [data[start : start + KITTY_CHUNK] for start in range(0, len(data), KITTY_CHUNK)]
    keys = [f"a=T,f=100,q=2,{size},m=", *["m="] * (len(chunks) - 1)]
    return "".join(
        f"\x1b_G{key}{int(number < len(chunks))};{chunk}\x1b\\"
        for number, (key, chunk) in enumerate(zip(keys, chunks, strict=True), start=1)
    )
