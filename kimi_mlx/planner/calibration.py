"""Predict the speed of each strategy from measured times of one layer and of messages, where no chip is known.

Pure: kimi_mlx.session.calibrate measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.planner.constants import Strategy
from kimi_mlx.planner.drafts import DraftShape
from kimi_mlx.planner.model_shape import ModelShape

MANY_TOKENS = 64
"""Number of tokens of the second measurement, besides 1."""

FEW_TOKENS = 8
"""Largest number of tokens of a step whose queries the ranks do not divide: a token and its draft."""

PROMPT_TOKENS = 16
"""Default length of the prompt of a prediction."""

SPLIT_STRATEGIES: tuple[Strategy, ...] = ("hybrid", "tensor")
"""Measured strategies that divide each layer."""


@dataclass(frozen=True)
class Times:
    """Seconds for 1 token and for MANY_TOKENS tokens, or for messages of their size."""

    one_s: float
    many_s: float

    def at(self, tokens: int) -> float:
        """Return the seconds for a number of tokens, on a line through both."""
        slope = (self.many_s - self.one_s) / (MANY_TOKENS - 1)
        return max(self.one_s + slope * (tokens - 1), 0.0)


@dataclass(frozen=True)
class Prediction:
    """Predicted speed of one sequence.

    Args:
        strategy: the strategy; `single` for one rank.
        prefill_tok_per_s: prompt tokens per second, with an empty cache.
        decode_tok_per_s: new tokens per second, without drafts.
        drafted_tok_per_s: new tokens per second with drafts; None without a draft model, or if drafts gain nothing.
    """

    strategy: Strategy
    prefill_tok_per_s: float
    decode_tok_per_s: float
    drafted_tok_per_s: float | None = None

    @property
    def best_tok_per_s(self) -> float:
        """New tokens per second, with drafts if they gain anything."""
        return self.drafted_tok_per_s or self.decode_tok_per_s


@dataclass(frozen=True)
class Calibration:
    """Measured times, on the slowest rank. All ranks measured at the same time.

    Args:
        num_ranks: number of ranks.
        num_layers: number of layers of the model.
        layers: a rank's share of a layer, by strategy; `single` is a whole layer.
        heads: output head for one token, by strategy.
        sums: sum of the hidden states over the ranks.
        gathers: gather of hidden states, with these tokens in each rank's part.
        hops: message with hidden states to the next rank.
        seconds: duration of the measurement.
    """

    num_ranks: int
    num_layers: int
    layers: Mapping[str, Times]
    heads: Mapping[str, float]
    sums: Times
    gathers: Times
    hops: Times
    seconds: float = field(default=0.0, compare=False)

    def predictions(self, prompt_tokens: int = PROMPT_TOKENS, draft: DraftShape | None = None) -> list[Prediction]:
        """Return the predictions of all measured strategies, the fastest in decode first, with drafts if there are any.

        Args:
            prompt_tokens: length of the prompt.
            draft: draft model; None without one.
        """
        if self.num_ranks == 1:
            strategies: Sequence[Strategy] = ("single",)
        else:
            strategies = ("pipeline", *(name for name in SPLIT_STRATEGIES if name in self.layers))
        predictions = [
            Prediction(
                name,
                prompt_tokens / self.step_s(name, prompt_tokens),
                1 / self.step_s(name, 1),
                None if draft is None else self._drafted_tok_per_s(name, draft),
            )
            for name in strategies
        ]
        return sorted(predictions, key=lambda prediction: -prediction.best_tok_per_s)

    def prediction(self, strategy: str, prompt_tokens: int) -> Prediction | None:
        """Return the prediction of a strategy, without drafts; None if it was not measured. One rank is `single`."""
        name = "single" if self.num_ranks == 1 else strategy
        return next((each for each in self.predictions(prompt_tokens) if each.strategy == name), None)

    def _drafted_tok_per_s(self, strategy: Strategy, draft: DraftShape) -> float | None:
        """Return the new tokens per second with drafts of the fastest length; None if drafts gain nothing.

        A draft token is taken to cost as much as a layer and the head on one rank: a draft model has both.
        """
        draft_s = self.layers["single"].one_s + self.heads["single"]
        best = max(
            draft.tokens_of(drafted) / (self.step_s(strategy, 1 + drafted) + drafted * draft_s)
            for drafted in range(1, draft.most_drafted + 1)
        )
        return best if best > 1 / self.step_s(strategy, 1) else None

    def step_s(self, strategy: Strategy, tokens: int) -> float:
        """Return the seconds of a step with new tokens of one sequence."""
        if strategy in ("single", "pipeline"):
            hops = 0.0 if strategy == "single" else (self.num_ranks - 1) * self.hops.at(tokens) + self.hops.one_s
            return self.num_layers * self.layers["single"].at(tokens) + self.heads["single"] + hops
        sums = {"hybrid": 1, "tensor": 2}[strategy] * self.sums.at(tokens)
        if strategy == "hybrid" and tokens > max(FEW_TOKENS, self.num_ranks - 1):
            sums += self.gathers.at(-(-tokens // self.num_ranks))
        layers_s = self.num_layers * (self.layers[strategy].at(tokens) + sums)
        return layers_s + self.heads["split"] + self.gathers.one_s

    def to_dict(self, prompt_tokens: int = PROMPT_TOKENS) -> dict[str, Any]:
        """Return the measured times and the predicted speeds, for JSON."""
        return {
            "measured": {key: value for key, value in asdict(self).items() if key != "seconds"},
            "measured_in_s": self.seconds,
            "prompt_tokens": prompt_tokens,
            "predicted": [asdict(prediction) for prediction in self.predictions(prompt_tokens)],
        }

    @classmethod
    def of_ranks(cls, num_layers: int, reports: Sequence[Mapping[str, Any]], seconds: float) -> Calibration:
        """Combine the reports of all ranks (kimi_mlx.rank.calibrate) into the times of the slowest.

        Args:
            num_layers: number of layers of the model.
            reports: report of each rank.
            seconds: duration of the measurement.
        """

        def slowest(name: str) -> Times:
            pairs = [report[name] for report in reports]
            return Times(*(max(float(pair[index]) for pair in pairs) for index in (0, 1)))

        layers = {
            name: Times(*(max(float(report["layers"][name][index]) for report in reports) for index in (0, 1)))
            for name in reports[0]["layers"]
        }
        heads = {name: max(float(report["heads"][name]) for report in reports) for name in reports[0]["heads"]}
        return cls(
            len(reports), num_layers, layers, heads, slowest("sums"), slowest("gathers"), slowest("hops"), seconds
        )


NOT_SENT: Mapping[str, Any] = {
    "quantization": None,
    "quantization_overrides": {},
    "compression": None,
    "yarn": None,
    "vision": None,
}
"""Fields of ModelConfig that do not determine the time of a layer, or are sent otherwise."""


def dimensions(shape: ModelShape) -> dict[str, Any]:
    """Return the dimensions of a model as JSON, with one quantization for all matrices: that of the experts."""
    config = shape.config
    quantization = config.quantization
    if quantization is None:
        bits = 8 * shape.bytes.expert / shape.values.expert
        quantization = None if bits > 12 else Quantization(4 if bits < 7 else 8, 32)
    plain = asdict(replace(config, **NOT_SENT))
    return {**plain, "quantization": None if quantization is None else asdict(quantization)}


def read_dimensions(value: Mapping[str, Any]) -> ModelConfig:
    """Read the output of `dimensions`."""
    quantization = value["quantization"]
    fields: dict[str, Any] = dict(value)
    fields["quantization"] = None if quantization is None else Quantization(**quantization)
    return ModelConfig(**fields)
