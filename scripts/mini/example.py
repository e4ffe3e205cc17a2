"""Draw the picture of the documentation, two red circles: `python -m scripts.mini.example`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from scripts.mini.pictures import COLORS, Item, Picture, draw

PATH = Path(__file__).resolve().parents[2] / "docs" / "images" / "two-red-circles.png"
TWO_RED_CIRCLES = Picture(
    336,
    224,
    (255, 255, 255),
    (
        Item("circle", "red", 104, 120, 50, COLORS["red"]),
        Item("circle", "red", 236, 96, 46, COLORS["red"]),
    ),
)


if __name__ == "__main__":
    PATH.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(TWO_RED_CIRCLES)).save(PATH, optimize=True)
