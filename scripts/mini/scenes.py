"""Make up pictures and the questions about them: name, count, side, number."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from scripts.mini.pictures import COLORS, SHAPES, Item, Number, Picture
from scripts.mini.tasks import Exchange
from scripts.mini.vision_architecture import CELL, MAX_PATCHES, PATCH_SIZE

GRIDS = ((8, 8), (8, 10), (10, 8), (8, 12), (12, 8), (10, 10), (10, 12), (12, 10), (8, 14), (14, 8))
"""Height and width in patches of the grids that pictures of up to `MAX_PATCHES` patches have after padding."""

PHRASES: dict[str, Any] = json.loads(Path(__file__).with_name("picture_phrases.json").read_text(encoding="utf-8"))
THOUGHTS = {
    "what": "Look at the picture.",
    "count": "Count them.",
    "total": "Count all.",
    "side": "Find its place.",
    "number": "Read the digits.",
    "color": "Look at its color.",
}
COUNTS = ("No", "One", "Two", "Three", "Four", "Five")
SIDES = ("left", "right", "top", "bottom", "middle")
SIDE_ANSWERS = {  # the name is repeated, so that the model has it at hand when it looks for the side
    "left": "The {} is on the left.",
    "right": "The {} is on the right.",
    "top": "The {} is at the top.",
    "bottom": "The {} is at the bottom.",
    "middle": "The {} is in the middle.",
}
COUNT_SHARES = (0.2, 0.2, 0.2, 0.2, 0.2)
KIND_SHARES = {"same": 0.44, "side": 0.08, "pair": 0.26, "number": 0.22}
WHITE_SHARE = 0.6
UNPADDED_SHARE = 0.6  # share of the pictures that fill their grid; the others get black pixels right and below


@dataclass(frozen=True)
class Scene:
    """A picture and what can be asked about it.

    Attributes:
        kind: key of `KIND_SHARES`.
        picture: what is drawn.
        exchanges: questions with answers, by task: what, count, side, other side, number, color.
    """

    kind: str
    picture: Picture
    exchanges: dict[str, Exchange]


def make_scene(rng: Random, grid: tuple[int, int], kind: str | None = None) -> Scene:
    """Make up a scene for a grid (height, width) of patches."""
    kind = kind or rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
    height, width = _size(rng, grid)
    makers = {"same": _same, "side": _at_a_side, "pair": _pair, "number": _number}
    return makers[kind](rng, width, height)


def _size(rng: Random, grid: tuple[int, int]) -> tuple[int, int]:
    """Return height and width in pixels of a picture with this grid that is not reduced."""
    full = PATCH_SIZE * grid[0], PATCH_SIZE * grid[1]
    if grid[0] * grid[1] <= MAX_PATCHES and rng.random() < UNPADDED_SHARE:
        return full
    while True:
        height, width = full[0] - rng.randint(0, CELL - 1), full[1] - rng.randint(0, CELL - 1)
        if (height // PATCH_SIZE) * (width // PATCH_SIZE) <= MAX_PATCHES:
            return height, width


def _jitter(rng: Random, rgb: tuple[int, int, int], most: int = 22) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-most, most))) for value in rgb)
    return red, green, blue


def _background(rng: Random) -> tuple[int, int, int]:
    if rng.random() < WHITE_SHARE:
        return 255, 255, 255
    base = rng.randint(225, 250)
    return _jitter(rng, (base, base, base), 10)


def _item(rng: Random, shape: str, color: str, x: float, y: float, radius: float) -> Item:
    angle = rng.uniform(-0.2, 0.2) if rng.random() < 0.4 else 0.0
    return Item(shape, color, x, y, radius, _jitter(rng, COLORS[color]), angle)


def _same(rng: Random, width: int, height: int) -> Scene:
    """Make one to five equal shapes anywhere."""
    count = rng.choices((1, 2, 3, 4, 5), COUNT_SHARES)[0]
    shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    places = _places(rng, width, height, count)
    items = tuple(_item(rng, shape, color, x, y, radius) for x, y, radius in places)
    picture = Picture(width, height, _background(rng), items)
    name = f"{color} {shape}" if rng.random() < 0.5 else shape
    exchanges = {
        "what": _exchange(rng, "what", caption(picture)),
        "count": _exchange(rng, rng.choice(("count", "count", "total")), f"{COUNTS[count]}.", name),
        "color": _exchange(rng, "color", f"{color.capitalize()}.", shape),
    }
    side = side_of(items[0], width, height)
    if count == 1 and side:
        exchanges["side"] = _side_exchange(rng, side, name)
    if count > 1:
        del exchanges["color"]  # its questions are about one shape
    return Scene("same", picture, exchanges)


def _places(rng: Random, width: int, height: int, count: int) -> list[tuple[float, float, float]]:
    """Return (x, y, radius) of shapes that do not touch, about equally large."""
    shorter = min(width, height)
    while True:
        most = {1: 0.4, 2: 0.26, 3: 0.21, 4: 0.19, 5: 0.18}[count]
        radius = shorter * rng.uniform(0.11, most)
        places: list[tuple[float, float, float]] = []
        for _ in range(40 * count):
            size = radius * rng.uniform(0.9, 1.1)
            x, y = rng.uniform(size + 2, width - size - 2), rng.uniform(size + 2, height - size - 2)
            if all(math.hypot(x - a, y - b) > 1.05 * (size + r) + 3 for a, b, r in places):
                places.append((x, y, size))
                if len(places) == count:
                    return places


def _near_side(rng: Random, side: str, width: int, height: int) -> tuple[float, float, float]:
    radius = min(width, height) * rng.uniform(0.11, 0.2)
    along = {"left": 0.2, "right": 0.8}.get(side, 0.5)
    down = {"top": 0.2, "bottom": 0.8}.get(side, 0.5)
    x = min(max(width * (along + rng.uniform(-0.07, 0.07)), radius + 1), width - radius - 1)
    y = min(max(height * (down + rng.uniform(-0.07, 0.07)), radius + 1), height - radius - 1)
    return x, y, radius


def _at_a_side(rng: Random, width: int, height: int) -> Scene:
    """Make one shape at a side or in the middle."""
    side, shape, color = rng.choice(SIDES), rng.choice(SHAPES), rng.choice(list(COLORS))
    item = _item(rng, shape, color, *_near_side(rng, side, width, height))
    picture = Picture(width, height, _background(rng), (item,))
    name = rng.choice((shape, f"{color} {shape}"))
    return Scene(
        "side",
        picture,
        {
            "side": _side_exchange(rng, side, name),
            "what": _exchange(rng, "what", caption(picture)),
            "color": _exchange(rng, "color", f"{color.capitalize()}.", shape),
        },
    )


def _pair(rng: Random, width: int, height: int) -> Scene:
    """Make two different shapes in different colors at opposite sides."""
    sides = rng.choice((("left", "right"), ("top", "bottom")))
    shapes, colors = rng.sample(SHAPES, 2), rng.sample(list(COLORS), 2)
    items = tuple(
        _item(rng, shape, color, *_near_side(rng, side, width, height))
        for shape, color, side in zip(shapes, colors, sides, strict=True)
    )
    picture = Picture(width, height, _background(rng), items)
    first, second = (
        _side_exchange(rng, sides[index], rng.choice((shapes[index], f"{colors[index]} {shapes[index]}")))
        for index in rng.sample((0, 1), 2)
    )
    exchanges = {"side": first, "other side": second, "what": _exchange(rng, "what", caption(picture))}
    return Scene("pair", picture, exchanges)


def _number(rng: Random, width: int, height: int) -> Scene:
    """Make a number of two digits that fills most of the picture."""
    digit_height = height * rng.uniform(0.55, 0.82)
    digit_width = digit_height * rng.uniform(0.45, 0.62)
    gap = digit_height * rng.uniform(0.16, 0.26)
    shrink = min(1.0, 0.86 * width / (2 * digit_width + gap))
    digit_height, digit_width, gap = digit_height * shrink, digit_width * shrink, gap * shrink
    left = _within(rng, width, 2 * digit_width + gap)
    top = _within(rng, height, digit_height)
    boxes = tuple((left + index * (digit_width + gap), top, digit_width, digit_height) for index in range(2))
    color = rng.choice(list(COLORS))
    value = rng.randint(10, 99)
    pen = digit_height * rng.uniform(0.045, 0.08)
    number = Number(value, color, boxes, pen, _jitter(rng, COLORS[color]), rng.uniform(-0.1, 0.1))
    picture = Picture(width, height, _background(rng), (), number)
    return Scene(
        "number",
        picture,
        {
            "number": _exchange(rng, "number", f"{value}."),
            "what": _exchange(rng, "what", caption(picture)),
        },
    )


def _within(rng: Random, space: float, size: float) -> float:
    """Return a place for `size` inside `space`, nearer to the middle than to the edges."""
    return (space - size) * (0.5 + rng.uniform(-0.35, 0.35))


def _exchange(rng: Random, task: str, answer: str, name: str = "") -> Exchange:
    phrases = PHRASES[task]
    # The first phrasings are the most frequent ones.
    phrase = phrases[0] if rng.random() < 0.25 else rng.choice(phrases)
    text = phrase.format(name)
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?.")
    return Exchange(text, THOUGHTS[task], answer)


def _side_exchange(rng: Random, side: str, name: str) -> Exchange:
    return _exchange(rng, "side", SIDE_ANSWERS[side].format(name), name)


def caption(picture: Picture) -> str:
    """Return the answer to "What do you see?"."""
    if picture.number is not None:
        return f"The number {picture.number.value}."
    names = [f"{item.color} {item.shape}" for item in picture.items]
    if len(set(names)) == 1 and len(names) > 1:
        return f"{COUNTS[len(names)]} {names[0]}s."
    return " and ".join(f"a {name}" for name in names).capitalize() + "."


def side_of(item: Item, width: int, height: int) -> str:
    """Return the side that an item is clearly at, or ""."""
    x, y = item.x / width, item.y / height
    if abs(y - 0.5) < 0.13 and not 0.3 < x < 0.7:
        return "left" if x < 0.5 else "right"
    if abs(x - 0.5) < 0.13 and not 0.3 < y < 0.7:
        return "top" if y < 0.5 else "bottom"
    return "middle" if abs(x - 0.5) < 0.1 and abs(y - 0.5) < 0.1 else ""


def scenes(seed: str, grid: tuple[int, int], kind: str | None = None) -> Iterator[Scene]:
    """Yield scenes without end; the same seed gives the same ones."""
    rng = Random(seed)
    while True:
        yield make_scene(rng, grid, kind)
