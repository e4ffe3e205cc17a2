"""Draw the pictures of kimi-mini-vl with NumPy: coloured shapes, and numbers of two digits.

A shape is a signed distance in pixels (negative inside), so its edge is smooth at any place and angle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from scripts.mini.digits import segments

SHAPES = ("circle", "square", "triangle", "star")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 205, 40),
    "purple": (150, 60, 170),
    "black": (25, 25, 25),
}
DIGIT_SEGMENTS = tuple(segments(digit) for digit in range(10))
RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Item:
    """A shape: centre (x, y) and radius in pixels, angle in radians."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    rgb: RGB
    angle: float = 0.0


@dataclass(frozen=True)
class Number:
    """A number of two digits: left top corner and size of each digit's box in pixels, half the width of the pen."""

    value: int
    color: str
    boxes: tuple[tuple[float, float, float, float], ...]  # x, y, width, height of each digit
    pen: float
    rgb: RGB
    slant: float = 0.0


@dataclass(frozen=True)
class Picture:
    """Everything that is drawn: items, or a number."""

    width: int
    height: int
    background: RGB
    items: tuple[Item, ...] = ()
    number: Number | None = None


def enlarge(picture: Picture, factor: int) -> Picture:
    """Return the picture at a multiple of its size."""
    items = tuple(
        replace(item, x=factor * item.x, y=factor * item.y, radius=factor * item.radius) for item in picture.items
    )
    number = picture.number
    if number is not None:
        boxes = tuple(tuple(factor * side for side in box) for box in number.boxes)
        number = replace(number, boxes=boxes, pen=factor * number.pen)
    return Picture(factor * picture.width, factor * picture.height, picture.background, items, number)


def draw(picture: Picture) -> np.ndarray:
    """Return the pixels (height, width, 3), uint8."""
    canvas = np.empty((picture.height, picture.width, 3), dtype=np.float32)
    canvas[:] = picture.background
    for item in picture.items:
        _draw_item(canvas, item)
    if picture.number is not None:
        for digit, box in zip(divmod(picture.number.value, 10), picture.number.boxes, strict=True):
            _draw_digit(canvas, picture.number, digit, box)
    return np.rint(canvas).astype(np.uint8)


def _window(canvas: np.ndarray, left: float, top: float, right: float, bottom: float):
    """Return the part of the canvas inside the bounds, and the centres of its pixels: x (1, w), y (h, 1)."""
    height, width, _ = canvas.shape
    x0, y0 = max(0, math.floor(left)), max(0, math.floor(top))
    x1, y1 = min(width, math.ceil(right)), min(height, math.ceil(bottom))
    x = np.arange(x0, x1, dtype=np.float32)[None] + 0.5
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5
    return canvas[y0:y1, x0:x1], x, y


def _blend(part: np.ndarray, distance: np.ndarray, rgb: RGB) -> None:
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    part += cover * (np.array(rgb, dtype=np.float32) - part)


def _draw_item(canvas: np.ndarray, item: Item) -> None:
    reach = item.radius * 1.05 + 1
    part, x, y = _window(canvas, item.x - reach, item.y - reach, item.x + reach, item.y + reach)
    x, y = x - item.x, y - item.y
    cosine, sine = math.cos(item.angle), math.sin(item.angle)
    _blend(part, distance_to(item.shape, x * cosine + y * sine, y * cosine - x * sine, item.radius), item.rgb)


def distance_to(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return the signed distance of points to a shape around the origin whose corners are at most `radius` away."""
    if shape == "circle":
        return np.hypot(x, y) - 0.9 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius * 0.72
    if shape == "triangle":
        return np.maximum(np.abs(x) * 3**0.5 / 2 - (y + radius) / 2, y - radius / 2)
    # A star: fold the plane into half of one of its five rays, from a tip to an inner corner.
    sector = 2 * math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    distance = np.hypot(x, y)
    along, across = distance * np.cos(angle), distance * np.sin(angle)
    inner_x, inner_y = 0.42 * radius * math.cos(sector / 2), 0.42 * radius * math.sin(sector / 2)
    edge_x, edge_y = inner_x - radius, inner_y
    length = math.hypot(edge_x, edge_y)
    return ((along - radius) * edge_y - across * edge_x) / length


def _draw_digit(canvas: np.ndarray, number: Number, digit: int, box: tuple[float, float, float, float]) -> None:
    left, top, width, height = box
    reach = number.pen + 1 + abs(number.slant) * height
    part, x, y = _window(canvas, left - reach, top - reach, left + width + reach, top + height + reach)
    ends = DIGIT_SEGMENTS[digit] * np.array((width, height), dtype=np.float32)
    ends[..., 0] += left + number.slant * (height / 2 - ends[..., 1])
    ends[..., 1] += top
    nearest = np.full(part.shape[:2], np.inf, dtype=np.float32)
    for (ax, ay), (bx, by) in ends:
        dx, dy = bx - ax, by - ay
        share = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0.0, 1.0)
        np.minimum(nearest, (x - ax - share * dx) ** 2 + (y - ay - share * dy) ** 2, out=nearest)
    _blend(part, np.sqrt(nearest) - number.pen, number.rgb)
