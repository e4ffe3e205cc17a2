"""The plot of a learning curve."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from scripts.mini.curve import draw, smooth


def test_the_curve_has_a_point_for_each_record_and_marks_the_parts():
    records = [{"tokens": 40000 * i, "loss": 5.0 / i, "part": i // 40, "quantized": i > 90} for i in range(1, 101)]
    root = ElementTree.fromstring(draw(records))
    namespace = "{http://www.w3.org/2000/svg}"
    (line,) = root.iter(f"{namespace}polyline")
    assert len(line.attrib["points"].split()) == 100
    assert sum("stroke-dasharray" in mark.attrib for mark in root.iter(f"{namespace}line")) == 3


def test_smoothing_keeps_a_constant():
    assert all(abs(value - 2.0) < 1e-9 for value in smooth([2.0] * 10))
