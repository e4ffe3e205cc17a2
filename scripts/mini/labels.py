"""Labels of the tokens of a picture, which the tower learns first, with linear probes on its output."""

from __future__ import annotations

import numpy as np

from scripts.mini.pictures import COLORS, SHAPES, Picture
from scripts.mini.scenes import SIDES, side_of
from scripts.mini.vision_architecture import CELL

LABELS: dict[str, int] = {
    "color": len(COLORS) + 1,
    "shape": len(SHAPES) + 2,  # the last is a digit
    "center": 2,
    "count": 6,
    "side": len(SIDES) + 1,
    "digit": 11,
    "tens": 11,
    "ones": 11,
}
"""Labels of a token, and their number of classes; class 0 means that the token has none."""


def labels(picture: Picture, grid: tuple[int, int]) -> np.ndarray:
    """Return the labels of the picture's tokens in the order of `LABELS`: (tokens, labels), int32."""
    rows, columns = grid[0] // 2, grid[1] // 2
    result = np.zeros((rows, columns, len(LABELS)), dtype=np.int32)
    x = (np.arange(columns) + 0.5)[None] * CELL
    y = (np.arange(rows) + 0.5)[:, None] * CELL
    colors = list(COLORS)
    for item in picture.items:
        covered = (x - item.x) ** 2 + (y - item.y) ** 2 < item.radius**2
        center = min(int(item.y // CELL), rows - 1), min(int(item.x // CELL), columns - 1)
        covered[center] = True
        side = side_of(item, picture.width, picture.height)
        values = (
            colors.index(item.color) + 1,
            SHAPES.index(item.shape) + 1,
            0,
            len(picture.items),
            SIDES.index(side) + 1 if side else 0,
            0,
            0,
            0,
        )
        result[covered] = values
        result[center][2] = 1
    if picture.number is not None:
        number = picture.number
        tens, ones = divmod(number.value, 10)
        color = colors.index(number.color) + 1
        for digit, (left, top, width, height) in zip((tens, ones), number.boxes, strict=True):
            covered = (x > left) & (x < left + width) & (y > top) & (y < top + height)
            center = int((top + height / 2) // CELL), int((left + width / 2) // CELL)
            covered[center] = True
            result[covered] = (color, LABELS["shape"] - 1, 0, 0, 0, digit + 1, tens + 1, ones + 1)
            result[center][2] = 1
    return result.reshape(rows * columns, -1)
