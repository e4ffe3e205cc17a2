"""Thumbnails: which terminals get them, and what they get."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from kimi_mlx.cli.chat.output.thumbnail import (
    KITTY_CHUNK,
    MAX_HEIGHT,
    MAX_WIDTH,
    find_graphics_protocol,
    thumbnail_sequence,
)

ITERM2 = {"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app", "LC_TERMINAL": "iTerm2"}
KITTY = {"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        (ITERM2, "iterm2"),
        (KITTY, "kitty"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),  # over ssh
        ({"TERM": "xterm-kitty"}, "kitty"),  # over ssh
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({**KITTY, "TERM_PROGRAM": "Apple_Terminal"}, "kitty"),  # kitty, started from Terminal
        ({**ITERM2, "NO_COLOR": "1"}, "iterm2"),
        ({**ITERM2, "TERM_PROGRAM": "vscode"}, None),  # started from iTerm2
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({**ITERM2, "TERM": "dumb"}, None),
        ({**KITTY, "TERM": ""}, None),
        ({**ITERM2, "TMUX": "/tmp/tmux-1/default,1,0"}, None),
        ({**KITTY, "TERM": "tmux-256color"}, None),
        ({**KITTY, "TERM": "screen"}, None),
        ({**KITTY, "STY": "1.pts"}, None),
        ({**KITTY, "ZELLIJ": "0"}, None),
    ],
)
def test_the_protocol_of_a_terminal(environment: dict[str, str], protocol: str | None) -> None:
    assert find_graphics_protocol(environment, is_terminal=True) == protocol
    assert find_graphics_protocol(environment, is_terminal=False) is None


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def decode_kitty(sequences: str) -> tuple[str, bytes]:
    """The keys of the first sequence, and the data of all."""
    found = re.findall(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", sequences)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in found) == sequences
    assert all(len(data) <= KITTY_CHUNK for _, data in found)
    assert [keys[-3:] for keys, _ in found] == ["m=1"] * (len(found) - 1) + ["m=0"]
    return found[0][0], base64.b64decode("".join(data for _, data in found))


def decode_iterm2(sequence: str) -> tuple[str, bytes]:
    match = re.fullmatch(r"\x1b\]1337;File=([^:]*):([A-Za-z0-9+/=]*)\x07", sequence)
    assert match is not None
    data = base64.b64decode(match[2])
    assert f"size={len(data)};" in match[1]
    return match[1], data


@pytest.mark.parametrize(
    ("size", "shown", "kitty", "iterm2"),
    [
        ((1024, 768), (213, 160), "r=8", "height=8"),
        ((3000, 100), (320, 11), "c=32", "width=32"),
        ((50, 7000), (1, 160), "r=8", "height=8"),
        ((28, 28), (28, 28), "r=2", "height=2"),
        ((1, 1), (1, 1), "r=1", "height=1"),
    ],
)
def test_a_thumbnail_is_a_small_png(size: tuple[int, int], shown: tuple[int, int], kitty: str, iterm2: str) -> None:
    image = noise(*size)
    for (keys, data), expected in (
        (decode_kitty(thumbnail_sequence(image, "kitty", columns=100)), kitty),
        (decode_iterm2(thumbnail_sequence(image, "iterm2", columns=100)), iterm2),
    ):
        assert expected in re.split("[,;]", keys)
        with Image.open(io.BytesIO(data)) as thumbnail:
            assert (thumbnail.format, thumbnail.mode, thumbnail.size) == ("PNG", "RGB", shown)
        assert len(data) < MAX_WIDTH * MAX_HEIGHT * 3 + 1000
    assert image.size == size  # not changed


def test_a_narrow_terminal_gets_a_narrow_thumbnail() -> None:
    keys, data = decode_kitty(thumbnail_sequence(noise(1000, 300), "kitty", columns=12))
    assert "c=10" in keys.split(",")
    with Image.open(io.BytesIO(data)) as thumbnail:
        assert thumbnail.size == (100, 30)


def test_the_terminal_is_asked_not_to_answer() -> None:
    assert "q=2" in decode_kitty(thumbnail_sequence(noise(9, 9), "kitty", 80))[0].split(",")


def test_every_mode_becomes_rgb() -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        keys, data = decode_iterm2(thumbnail_sequence(noise(40, 20).convert(mode), "iterm2", 80))
        assert data.startswith(b"\x89PNG"), keys
