"""Shapes of the ten digits as strokes, so that no font is needed.

A stroke is a polyline in a box of width and height 1; y points down.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

Point = tuple[float, float]
ARC_STEP = 30  # degrees between the points of an arc


def _arc(x: float, y: float, radius_x: float, radius_y: float, start: int, end: int) -> list[Point]:
    """Return points of an ellipse around (x, y), from one angle to another: degrees, clockwise from the right."""
    count = max(1, round(abs(end - start) / ARC_STEP))
    angles = [math.radians(start + (end - start) * step / count) for step in range(count + 1)]
    return [(x + radius_x * math.cos(angle), y + radius_y * math.sin(angle)) for angle in angles]


_SIX = [_arc(0.5, 0.68, 0.46, 0.32, 0, 360), _arc(0.95, 0.68, 0.91, 0.66, 180, 262)]

STROKES: tuple[list[list[Point]], ...] = (
    [_arc(0.5, 0.5, 0.46, 0.5, 0, 360)],
    [[(0.2, 0.22), (0.55, 0.0), (0.55, 1.0)]],
    [[*_arc(0.5, 0.28, 0.45, 0.28, 180, 395), (0.02, 1.0), (1.0, 1.0)]],
    [_arc(0.45, 0.25, 0.45, 0.25, 200, 450), _arc(0.45, 0.73, 0.5, 0.27, 270, 520)],
    [[(0.78, 1.0), (0.78, 0.0), (0.0, 0.68), (1.0, 0.68)]],
    [[(0.95, 0.0), (0.15, 0.0), (0.07, 0.47), *_arc(0.45, 0.68, 0.5, 0.32, 220, 510)]],
    _SIX,
    [[(0.0, 0.0), (1.0, 0.0), (0.35, 1.0)]],
    [_arc(0.5, 0.26, 0.4, 0.26, 0, 360), _arc(0.5, 0.74, 0.48, 0.26, 0, 360)],
    [[(1 - x, 1 - y) for x, y in stroke] for stroke in _SIX],
)


def segments(digit: int) -> np.ndarray:
    """Return the straight segments of a digit: (segments, 2 ends, 2 coordinates), float32."""
    pairs = [pair for stroke in STROKES[digit] for pair in pairwise(stroke)]
    return np.array(pairs, dtype=np.float32)
