"""Predictions compared with published measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_mlx.hub.catalogue import draft_of
from kimi_mlx.planner.backtest import TYPICAL_ERROR, backtest, left_out, median_error, rows
from kimi_mlx.planner.constants import FITTED
from kimi_mlx.planner.drafts import make_draft_shape, published_draft_config
from kimi_mlx.planner.fit import fit
from kimi_mlx.planner.links import RDMA, TCP
from kimi_mlx.planner.machines import parse_machines
from kimi_mlx.planner.model_shape import known_shape, with_expert_bits
from kimi_mlx.planner.search import make_plan

DOCS = Path(__file__).parents[3] / "docs" / "planner.md"


def test_median_errors() -> None:
    comparisons = [comparison for comparison in backtest() if not comparison.is_streamed]
    others = [comparison for comparison in comparisons if not comparison.row.fit]
    assert len(others) >= 8
    new = [comparison for comparison in comparisons if comparison.is_new]
    assert median_error(comparisons) <= 0.06  # 5.3 %
    assert median_error(others) <= 0.08  # 7.1 %
    assert median_error(new) <= TYPICAL_ERROR  # 9.5 %
    assert median_error(comparison for comparison in new if comparison.metric == "decode") <= 0.06  # 5.7 %
    assert median_error(comparison for comparison in new if comparison.metric == "prefill") <= 0.11  # 10.7 %


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_docs_state_what_two_macs_should_do() -> None:
    """Each row of the table has the numbers that its command prints."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|") and "`kimi-mlx plan kimi-k2.6 --machines" in line]
    table = [line.strip("| ").split(" | ") for line in rows]
    assert len(table) >= 7
    for _, _, without, drafted, _, _, command in table:
        words = command.strip("`").split()
        shape = known_shape(words[2])
        if "--expert-bits" in words:
            shape = with_expert_bits(shape, int(words[words.index("--expert-bits") + 1]))
        machines = parse_machines(words[words.index("--machines") + 1])
        entry = draft_of(words[2])
        draft = make_draft_shape("", published_draft_config(), entry)
        for cell, with_draft in ((without, None), (drafted, draft)):
            is_fast = "--fast-sync" in words
            choice = make_plan(shape, machines, [RDMA, TCP], 8192, is_fast_sync=is_fast, draft=with_draft).choice
            assert choice is not None
            expected = f"{choice.best_tok_per_s:.1f} (`{choice.strategy}`{', SSD' if choice.experts else ''})"
            assert cell == expected, command
