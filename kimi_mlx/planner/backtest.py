"""Published figures against what the planner says of the same machines, model and program."""

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
from kimi_mlx.planner.model_shape import shape_with_bits
from kimi_mlx.planner.portions import make_portions
from kimi_mlx.planner.speed import Setup, decode, prefill

Metric = Literal["decode", "prefill"]

TYPICAL_ERROR = 0.10
"""The median error of the rows that are new, rounded up; a test compares."""

LINKS = {"rdma": RDMA, "tcp": TCP, None: None}


@dataclass(frozen=True)
class BacktestRow:
    """A published measurement, from `backtest.json`; see there.

    Args:
        id: a short name.
        machines: as in `--machines`.
        engine: the program.
        strategy: how the model was divided.
        link: between the machines.
        is_fast_sync: with MLX_METAL_FAST_SYNCH=1.
        dimensions: of the model, in `models.json`.
        expert_bits: bits a value of the routed experts.
        rest_bits: of the rest.
        context: tokens before the decoded ones.
        decode: tok/s, if published.
        prompt: tokens of the prompt.
        prefill: tok/s, if published.
        fit: whether the constants were fitted on it.
        is_repeat: whether it repeats the set-up of a row that they were fitted on.
        assumed: what the source does not say.
        source: where it is from.
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


@dataclass(frozen=True)
class Comparison:
    """A published figure and the predicted one, in tok/s."""

    row: BacktestRow
    metric: Metric
    published: float
    predicted: float

    @property
    def is_new(self) -> bool:
        """Whether nothing like it was fitted."""
        return not (self.row.fit or self.row.is_repeat)

    @property
    def error(self) -> float:
        """Relative to what was published; positive if the prediction is too fast."""
        return self.predicted / self.published - 1


@cache
def _data() -> dict[str, Any]:
    return json.loads(resources.files("kimi_mlx.planner").joinpath("backtest.json").read_text(encoding="utf-8"))


def rows() -> list[BacktestRow]:
    """All rows."""
    return [BacktestRow(**raw) for raw in _data()["rows"]]


def left_out() -> list[tuple[str, str]]:
    """Published figures that are no rows, and why."""
    return [(each["what"], each["why"]) for each in _data()["left_out"]]


def setup_of(row: BacktestRow, constants: Constants = FITTED) -> Setup:
    """A row's machines and model; shares are even, as those programs make them."""
    engine = ENGINE_PROFILES[row.engine]
    shape = shape_with_bits(row.dimensions, row.dimensions, row.expert_bits, row.rest_bits)
    machines = parse_machines(row.machines)
    portions = make_portions(row.strategy, shape, len(machines), engine.slices_head)
    fence_s = FAST_FENCE_S if row.is_fast_sync else FENCE_S
    return Setup(shape, row.strategy, machines, portions, LINKS[row.link], engine, fence_s, constants)


def compare(row: BacktestRow, constants: Constants = FITTED) -> list[Comparison]:
    """One or two comparisons of a row."""
    setup = setup_of(row, constants)
    found: list[Comparison] = []
    if row.decode is not None:
        found.append(Comparison(row, "decode", row.decode, 1 / decode(setup, row.context).total_s))
    if row.prefill is not None and row.prompt is not None:
        predicted = row.prompt / prefill(setup, row.prompt).total_s
        found.append(Comparison(row, "prefill", row.prefill, predicted))
    return found


def backtest(constants: Constants = FITTED, among: Sequence[BacktestRow] | None = None) -> list[Comparison]:
    """All comparisons."""
    return [each for row in (rows() if among is None else among) for each in compare(row, constants)]


def median_error(comparisons: Iterable[Comparison]) -> float:
    """Of the errors' sizes."""
    return median(abs(each.error) for each in comparisons)
