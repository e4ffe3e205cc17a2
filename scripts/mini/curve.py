"""Draw the learning curve of a run as SVG: `python -m scripts.mini.curve LOG PICTURE [MODEL]`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 56, 16, 34, 40
SMOOTHING = 0.8
LOSSES = (5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
COLOR, GREY = "#3366aa", "#999999"
# Per model: name and value of a field of the log, and the label of the step from which the field has the value.
EVENTS: dict[str, tuple[tuple[str, Any, str], ...]] = {
    "kimi-mini": (
        ("part", 1, "all tasks, rows to 512"),
        ("part", 2, "rows to 1,024"),
        ("quantized", True, "4-bit rounding"),
    ),
    "kimi-mini-vl": (
        ("part", 1, "tower and text model together"),
        ("quantized", True, "4-bit rounding"),
    ),
}


def smooth(losses: list[float]) -> list[float]:
    """Return the running geometric mean."""
    logs: list[float] = []
    for loss in losses:
        value = math.log(max(loss, 1e-4))
        logs.append(value if not logs else SMOOTHING * logs[-1] + (1 - SMOOTHING) * value)
    return [math.exp(value) for value in logs]


def draw(records: list[dict[str, Any]], model: str = "kimi-mini") -> str:
    """Return the plot as SVG: loss over tokens, with a logarithmic axis for the loss."""
    tokens = [record["tokens"] / 1e6 for record in records]
    losses = smooth([record["loss"] for record in records])
    low, high = math.log(min(min(losses), 0.05)), math.log(max(losses))

    def x_of(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / tokens[-1]

    def y_of(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log(loss)) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in LOSSES:
        if low <= math.log(loss) <= high:
            parts.append(_line(LEFT, y_of(loss), WIDTH - RIGHT, y_of(loss), "#e4e4e4"))
            parts.append(_text(LEFT - 8, y_of(loss) + 4, f"{loss:g}", "end"))
    step = max(1, round(tokens[-1] / 8))
    for million in range(0, int(tokens[-1]) + 1, step):
        parts.append(_text(x_of(million), HEIGHT - 20, f"{million}", "middle"))
    parts.append(_text(WIDTH / 2, HEIGHT - 4, "million tokens", "middle"))
    for row, (name, value, label) in enumerate(EVENTS[model]):
        at = next((t for t, record in zip(tokens, records, strict=True) if record[name] == value), None)
        if at is not None:
            parts.append(_line(x_of(at), TOP, x_of(at), HEIGHT - BOTTOM, GREY, "4 4"))
            parts.append(_text(x_of(at) + 4, TOP + 12 + 16 * row, label, "start"))
    points = " ".join(f"{x_of(t):.1f},{y_of(loss):.1f}" for t, loss in zip(tokens, losses, strict=True))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOR}" stroke-width="1.6"/>')
    parts.append(_text(LEFT, 18, f"{model}: training loss (cross-entropy per token, smoothed)", "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(x1: float, y1: float, x2: float, y2: float, color: str, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#444444">{text}</text>'


def read(log: Path) -> list[dict[str, Any]]:
    """Return the records of a log; if a step was repeated after a resume, its later record."""
    records = (json.loads(line) for line in log.read_text().splitlines())
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(read(Path(sys.argv[1])), *sys.argv[3:]))
