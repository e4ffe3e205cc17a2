"""Predictions from measured times, and the strategy that they choose."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kimi_mlx.bench.workloads import SHAPES, synthetic_config
from kimi_mlx.model.config import parse_config
from kimi_mlx.planner.calibration import MANY_TOKENS, Calibration, Times, dimensions, read_dimensions
from kimi_mlx.planner.choice import by_calibration, needs_calibration
from kimi_mlx.planner.drafts import PUBLISHED_DRAFTED, DraftShape, published_draft_config
from kimi_mlx.planner.links import RDMA
from kimi_mlx.planner.machines import any_machine
from kimi_mlx.planner.model_shape import ModelShape, known_shape, shape_of_config

FREE = Times(0, 0)

WIDE = Calibration(
    2,
    8,
    {"single": Times(0.0165, 1.0), "hybrid": Times(0.010, 0.51), "tensor": Times(0.0092, 0.52)},
    {"single": 0.0075, "split": 0.0038},
    Times(0.0043, 0.0046),
    Times(0.0043, 0.0046),
    Times(0.0044, 0.0045),
)
"""A layer of `wide` on two cores of an AMD EPYC, and messages over a link of 4 ms."""

DEEP = Calibration(
    2,
    61,
    {"single": Times(0.00146, 0.05), "hybrid": Times(0.00142, 0.026), "tensor": Times(0.00138, 0.029)},
    {"single": 0.0019, "split": 0.001},
    Times(0.0011, 0.0013),
    Times(0.0011, 0.0012),
    Times(0.0011, 0.0012),
)
"""The same of `deep` and 1 ms."""


def shape(name: str) -> ModelShape:
    return shape_of_config(name, parse_config(synthetic_config(name)))


def test_wide_at_4_ms_takes_hybrid_and_deep_at_1_ms_pipeline() -> None:
    choice = by_calibration(WIDE, shape("wide"), ())
    assert choice.strategy == "hybrid"
    assert "hybrid" not in choice.reason
    assert choice.to_dict()["calibration"]["measured"]["num_layers"] == 8
    assert by_calibration(DEEP, shape("deep"), ()).strategy == "pipeline"


def test_drafts_may_change_the_choice() -> None:
    """In `hybrid` a step of several tokens waits for the link as often as one of a single token."""
    for chance, strategy in ((0.97, "hybrid"), (0.3, "pipeline"), (0.0, "pipeline")):
        tokens_per_step = sum(chance**drafted for drafted in range(PUBLISHED_DRAFTED + 1))
        draft = DraftShape("draft", published_draft_config(), tokens_per_step, "")
        choice = by_calibration(DEEP, shape("deep"), (), draft)
        assert choice.strategy == strategy
        assert ("with drafts" in choice.reason) == (chance > 0.9)
        best, *_ = DEEP.predictions(draft=draft)
        assert best.strategy == strategy
        assert best.best_tok_per_s >= DEEP.predictions()[0].decode_tok_per_s


def test_uneven_machines_get_shares_by_memory() -> None:
    machines = [any_machine("a", None, 64 * 2**30, None), any_machine("b", None, 16 * 2**30, None)]
    choice = by_calibration(WIDE, shape("wide"), machines)
    assert choice.strategy.startswith("hybrid:")
    assert len(choice.memory) == 2


def test_a_step_adds_layers_messages_and_head() -> None:
    assert WIDE.step_s("pipeline", 1) == pytest.approx(8 * 0.0165 + 0.0075 + 2 * 0.0044)
    assert WIDE.step_s("hybrid", 1) == pytest.approx(8 * (0.010 + 0.0043) + 0.0038 + 0.0043)
    assert WIDE.step_s("tensor", 1) == pytest.approx(8 * (0.0092 + 2 * 0.0043) + 0.0038 + 0.0043)
    gathers = 8 * WIDE.gathers.at(MANY_TOKENS // 2)
    assert WIDE.step_s("hybrid", MANY_TOKENS) == pytest.approx(8 * (0.51 + 0.0046) + gathers + 0.0038 + 0.0043)


def test_one_rank_is_predicted_too() -> None:
    (prediction,) = replace(WIDE, num_ranks=1, sums=FREE, gathers=FREE, hops=FREE).predictions(16)
    assert prediction.strategy == "single"
    assert prediction.decode_tok_per_s == pytest.approx(1 / (8 * 0.0165 + 0.0075))


def test_the_slowest_rank_counts() -> None:
    report = {
        "layers": {"single": [1, 2]},
        "heads": {"single": 3},
        "sums": [4, 5],
        "gathers": [6, 7],
        "hops": [8, 9],
    }
    other = {**report, "layers": {"single": [2, 1]}, "hops": [0, 0]}
    calibration = Calibration.of_ranks(5, [report, other], 1.0)
    assert calibration.layers == {"single": Times(2, 2)}
    assert calibration.hops == Times(8, 9)


@pytest.mark.parametrize("name", [*SHAPES, "kimi-k2", "moonlight"])
def test_dimensions_can_be_sent(name: str) -> None:
    model = shape(name) if name in SHAPES else known_shape(name)
    config = read_dimensions(dimensions(model))
    assert config.hidden_size == model.config.hidden_size
    assert config.quantization is not None


def test_small_models_and_known_machines_are_not_measured() -> None:
    known, unknown = any_machine("a", "Apple M3 Ultra", 2**39, None), any_machine("b", None, 2**39, None)
    assert needs_calibration(shape("wide"), [known, unknown], RDMA)
    assert needs_calibration(shape("wide"), [known, known], None)
    assert not needs_calibration(shape("wide"), [known, known], RDMA)
    assert not needs_calibration(None, [unknown], None)
    tiny = shape("wide")
    assert not needs_calibration(replace(tiny, config=replace(tiny.config, num_hidden_layers=1)), [unknown], None)
