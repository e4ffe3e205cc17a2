"""The prediction for the cases of a benchmark: the planner's, where it knows the machine, or that of a calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kimi_mlx.bench.measure import Case
from kimi_mlx.cluster.hosts.machine import local_machine
from kimi_mlx.errors import UsageError
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.planner.calibration import Calibration
from kimi_mlx.planner.constants import FENCE_S, FITTED, KIMI_MLX
from kimi_mlx.planner.machines import Machine, machine_of_host
from kimi_mlx.planner.model_shape import shape_of_config
from kimi_mlx.planner.portions import make_portions
from kimi_mlx.planner.speed import Setup, decode, prefill

Predict = Callable[[Case], "Prediction | None"]
"""Returns the prediction for a case; None for several requests at once and for images."""


@dataclass(frozen=True)
class Prediction:
    """Predicted speed of a case.

    Args:
        decode_tok_per_s: decode rate after the prompt.
        first_token_s: time to the first token.
    """

    decode_tok_per_s: float
    first_token_s: float


def predictor_here(config: ModelConfig) -> Predict | None:
    """Return the predictor for one rank on this machine; None if its chip is not known."""
    here = local_machine()
    try:
        machine = machine_of_host("this machine", here.chip, here.memory_bytes, None)
    except UsageError:
        return None
    return predictor(config, machine)


def predictor(config: ModelConfig, machine: Machine) -> Predict:
    """Return the predictor for one rank on a machine."""
    shape = shape_of_config("", config)
    setup = Setup(shape, "single", [machine], make_portions("hybrid", shape, 1), None, KIMI_MLX, FENCE_S, FITTED)

    def predict(case: Case) -> Prediction | None:
        if case.concurrency > 1 or case.images:
            return None
        rate = 1 / decode(setup, case.depth + case.prompt_tokens).total_s
        return Prediction(rate, prefill(setup, case.prompt_tokens, case.depth).total_s)

    return predict


def calibrated_predictor(calibration: Calibration, strategy: str) -> Predict:
    """Return the predictor from times that the ranks have measured; it predicts cases with an empty cache only."""

    def predict(case: Case) -> Prediction | None:
        if case.concurrency > 1 or case.images or case.depth:
            return None
        prediction = calibration.prediction(strategy, case.prompt_tokens)
        if prediction is None:
            return None
        return Prediction(prediction.decode_tok_per_s, case.prompt_tokens / prediction.prefill_tok_per_s)

    return predict
