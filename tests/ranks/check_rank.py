"""One rank of a ring on which rank 1 computes or receives something else than it should; see test_checks.

MLX's environment variables set the rank and the hostfile. The cases are a JSON list on standard input; for each, one
line on standard output has the error's message, or null.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import RingError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.moe import MoE
from kimi_mlx.parallel.communicator import RankCommunicator
from kimi_mlx.parallel.group import MlxGroup
from kimi_mlx.runtime.load import load_share, prepare_device
from tests.divisible import make_prompt

LAYER = 1
CHECK_EVERY = 4


class FaultyGroup(MlxGroup):
    """A group that changes the lowest bits of a value that it sends to a neighbour."""

    def send(self, x: mx.array, rank: int) -> mx.array:
        """Send x with another first value."""
        return super().send(x.at[0].add(1e-3), rank)


def main() -> None:
    """Join the ring and run the cases."""
    cases = json.load(sys.stdin)
    prepare_device()
    mlx_group = mx.distributed.init(strict=True, backend="ring")
    for case in cases:
        is_faulty_link = case["fault"] == "link" and mlx_group.rank() == 0
        group = (FaultyGroup if is_faulty_link else MlxGroup)(mlx_group)
        print(json.dumps(run(case, group)), flush=True)


def run(case: dict[str, Any], group: MlxGroup) -> str | None:
    """Generate with checks; return the message of the error.

    Args:
        case: `folder`, `strategy`, `fault`, `max_tokens`.
        group: ranks that share the model.
    """
    folder = Path(case["folder"])
    model = load_share(folder, load_config(folder), "float32", group, strategy=case["strategy"])
    assert isinstance(model.communicator, RankCommunicator)
    model.communicator.check_every = CHECK_EVERY
    if group.rank == 1:
        plant(model, case["fault"])
    try:
        list(Engine(model, prefill_chunk=8).generate(Request(make_prompt(30, 1), max_tokens=case["max_tokens"])))
    except RingError as error:
        return error.message
    except RuntimeError as error:  # the neighbour has found a difference and is gone
        return str(error)
    return None


def plant(model: Model, fault: str) -> None:
    """Change a weight that every rank holds, as another chip rounds differently."""
    layer = model.layers[LAYER]
    if fault == "router":  # the choice of experts of near ties
        assert isinstance(layer.mlp, MoE)
        bias = layer.mlp.gate.e_score_correction_bias
        layer.mlp.gate.e_score_correction_bias = bias + 0.5 * (mx.arange(bias.size) % 2)
    elif fault == "states":
        layer.post_attention_layernorm = layer.post_attention_layernorm * (1 + 1e-6)
    elif fault == "weights":  # the same experts, with other weights
        assert isinstance(layer.mlp, MoE)
        layer.mlp.gate.weight = layer.mlp.gate.weight * (1 + 1e-6)
    elif fault == "attention":
        layer.input_layernorm = layer.input_layernorm * (1 + 1e-5)
    elif fault == "keys":
        layer.self_attn.kv_a_layernorm = layer.self_attn.kv_a_layernorm * (1 + 1e-5)
    elif fault == "norm":
        model.norm = model.norm * (1 + 1e-5)


if __name__ == "__main__":
    main()
