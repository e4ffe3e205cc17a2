"""Predictions compared with published measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_mlx.planner.backtest import TYPICAL_ERROR, backtest, left_out, median_error, rows
from kimi_mlx.planner.constants import FITTED
from kimi_mlx.planner.fit import fit

DOCS = Path(__file__).parents[3] / "docs" / "planner.md"


def test_median_errors() -> None:
    comparisons = backtest()
    others = [comparison for comparison in comparisons if not comparison.row.fit]
    assert len(others) >= 8
    new = [comparison for comparison in comparisons if comparison.is_new]
    assert median_error(comparisons) <= 0.06  # 5.3 %
    assert median_error(others) <= 0.08  # 7.1 %
    assert median_error(new) <= TYPICAL_ERROR  # 9.5 %
    assert median_error(comparison for comparison in new if comparison.metric == "decode") <= 0.06  # 5.7 %
    assert median_error(comparison for comparison in new if comparison.metric == "prefill") <= 0.11  # 10.7 %


def test_the_constants_are_fitted_on_at_most_half_of_the_rows() -> None:
    fitted = [row for row in rows() if row.fit]
    assert 2 * len(fitted) <= len(rows())
    fitted = fit()
    assert fitted.bandwidth_share == pytest.approx(FITTED.bandwidth_share, rel=0.01)
    assert fitted.kernel_s == pytest.approx(FITTED.kernel_s, rel=0.02)
    assert fitted.compute_share == pytest.approx(FITTED.compute_share, rel=0.01)


def test_every_row_has_a_source() -> None:
    assert all(row.source and row.assumed for row in rows())
    assert len({row.id for row in rows()}) == len(rows())
    assert left_out()


def test_the_docs_contain_every_row() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for comparison in backtest():
        numbers = f"{comparison.published:.1f} | {comparison.predicted:.1f} | {100 * comparison.error:+.0f} %"
        line = f"| {comparison.row.id} | {comparison.metric} | {numbers} |"
        assert line in text, f"docs/planner.md lacks: {line}"
