"""Compare published measurements with the predictions for the same machines, model and program."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from statistics import median
from typing import Any, Literal

from kimi_mlx.planner.constants import ENGINE_PROFILES, FAST_FENCE_S, FENCE_S, FITTED, Constants, Strategy
from kimi_mlx.planner.links import RDMA, TCP
from kimi_mlx.planner.machines import parse_machines
from kimi_mlx.planner.model_shape import STORED_ROUTER_BITS, shape_with_bits
from kimi_mlx.planner.portions import make_portions
from kimi_mlx.planner.speed import Setup, decode, prefill
from kimi_mlx.planner.streaming import plan_streaming
from kimi_mlx.sizing.expert_memory import ExpertMemory

Metric = Literal["decode", "prefill"]

TYPICAL_ERROR = 0.10
"""Median error of the rows with new set-ups, rounded up; checked by a test."""

LINKS = {"rdma": RDMA, "tcp": TCP, None: None}


@dataclass(frozen=True)
class BacktestRow:
    """A published measurement from `backtest.json`, which describes its fields.

    Args:
        id: short name.
        machines: machines as in `--machines`.
        engine: name of the inference program.
        strategy: strategy of the split.
        link: link between the machines.
        is_fast_sync: whether MLX_METAL_FAST_SYNCH=1 was set.
        dimensions: name of the model's dimensions in `models.json`.
        expert_bits: bits per value of the routed experts.
        rest_bits: bits per value of everything else.
        context: number of tokens before the decoded ones.
        decode: published decode tok/s, if any.
        prompt: number of prompt tokens.
        prefill: published prefill tok/s, if any.
        fit: whether the constants were fitted on this row.
        is_repeat: whether the set-up is that of a fitted row.
        assumed: assumptions about facts that the source does not state.
        source: source of the measurement.
        expert_memory: memory for experts, as `--expert-memory` takes it; None if all experts were in memory.
    """

    id: str
    machines: str
    engine: str
    strategy: Strategy
    link: Literal["rdma", "tcp"] | None
    is_fast_sync: bool
    dimensions: str
    expert_bits: float
    rest_bits: float
    context: int
    decode: float | None
    prompt: int | None
    prefill: float | None
    fit: bool
    is_repeat: bool
    assumed: str
    source: str
    expert_memory: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A published rate and the predicted one, in tok/s."""

    row: BacktestRow
    metric: Metric
    published: float
    predicted: float

    @property
    def is_new(self) -> bool:
        """Whether no similar set-up was fitted, and all experts were in memory."""
        return not (self.row.fit or self.row.is_repeat or self.is_streamed)

    @property
    def is_streamed(self) -> bool:
        """Whether some experts were read from the SSD. Such rows depend on assumed hits; their median is separate."""
        return self.row.expert_memory is not None

    @property
    def error(self) -> float:
        """Relative error; positive if the prediction is too fast."""
        return self.predicted / self.published - 1


@cache
def _data() -> dict[str, Any]:
    return json.loads(resources.files("kimi_mlx.planner").joinpath("backtest.json").read_text(encoding="utf-8"))


def rows() -> list[BacktestRow]:
    """Return all rows."""
    return [BacktestRow(**raw) for raw in _data()["rows"]]


def left_out() -> list[tuple[str, str]]:
    """Return published measurements that were not used, with the reason."""
    return [(entry["measurement"], entry["reason"]) for entry in _data()["left_out"]]


def setup_of(row: BacktestRow, constants: Constants = FITTED) -> Setup:
    """Return a row's machines and model. Shares are even, as in the programs that were measured."""
    engine = ENGINE_PROFILES[row.engine]
    shape = shape_with_bits(
        row.dimensions, row.dimensions, row.expert_bits, row.rest_bits, router_bits=STORED_ROUTER_BITS
    )
    machines = parse_machines(row.machines)
    portions = make_portions(row.strategy, shape, len(machines), engine.slices_head)
    fence_s = FAST_FENCE_S if row.is_fast_sync else FENCE_S
    streaming = None
    if row.expert_memory is not None:
        context = max(row.context, row.prompt or 0)
        streaming = plan_streaming(machines, portions, shape, context, ExpertMemory.parse(row.expert_memory))
        assert streaming is not None
    return Setup(
        shape, row.strategy, machines, portions, LINKS[row.link], engine, fence_s, constants, streaming=streaming
    )


def compare(row: BacktestRow, constants: Constants = FITTED) -> list[Comparison]:
    """Compare decode, prefill, or both of a row."""
    setup = setup_of(row, constants)
    comparisons: list[Comparison] = []
    if row.decode is not None:
        comparisons.append(Comparison(row, "decode", row.decode, 1 / decode(setup, row.context).total_s))
    if row.prefill is not None and row.prompt is not None:
        predicted = row.prompt / prefill(setup, row.prompt).total_s
        comparisons.append(Comparison(row, "prefill", row.prefill, predicted))
    return comparisons


def backtest(constants: Constants = FITTED, selected: Sequence[BacktestRow] | None = None) -> list[Comparison]:
    """Compare the selected rows; None for all."""
    return [comparison for row in (rows() if selected is None else selected) for comparison in compare(row, constants)]


def median_error(comparisons: Iterable[Comparison]) -> float:
    """Return the median of the absolute errors."""
    return median(abs(comparison.error) for comparison in comparisons)
