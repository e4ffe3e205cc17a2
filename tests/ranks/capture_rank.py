"""One rank of a ring that captures hidden states in some steps, for each of several cases.

MLX's environment variables set the rank and the hostfile. The cases are a JSON list on standard input. For each case
the leader writes the captured states of all steps to a file, and each rank prints their number.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import CapturedStates, Model, SequenceSlice
from kimi_mlx.parallel.communicator import RankCommunicator
from kimi_mlx.parallel.group import Group, MlxGroup
from kimi_mlx.parallel.pipeline_communicator import PipelineCommunicator
from kimi_mlx.parallel.placement import Range
from kimi_mlx.rank.rendezvous import pin_to_cpu
from kimi_mlx.runtime.load import load_share, prepare_device


def main() -> None:
    """Join the ring and run the cases."""
    cases = json.load(sys.stdin)
    prepare_device()
    pin_to_cpu((int(os.environ["MLX_RANK"]), int(sys.argv[1])))
    group = MlxGroup(mx.distributed.init(strict=True, backend="ring"))
    for case in cases:
        states = captured(case, group) if "folder" in case else relayed(case, group)
        if group.rank == 0:
            np.savez(case["file"], *states)
        print(json.dumps(len(states)), flush=True)


def captured(case: dict[str, Any], group: Group | None) -> list[np.ndarray]:
    """Return the captured states of each step, on the leader.

    Args:
        case: `folder`, `strategy`, `layers`; `steps`, pairs of a length and a number of logits of each sequence.
        group: ranks that share the model; None for one process.
    """
    folder = Path(case["folder"])
    config = load_config(folder)
    model = load_share(folder, config, "float32", group, strategy=case["strategy"])
    model.capture(case["layers"])
    longest = max(sum(length for length, _ in parts) for parts in case["steps"])
    tokens = mx.array(np.random.default_rng(1).integers(0, config.vocab_size, (1, longest)))
    states = run_steps(model, tokens, case["steps"])
    return [np.array(each.array()) for each in states if each is not None]


def relayed(case: dict[str, Any], group: MlxGroup) -> list[np.ndarray]:
    """Return the captured states of each step of a pipeline whose layers, one on each rank, only add 1.

    Args:
        case: `num_tokens`, `hidden_size`, `num_steps`; only the last step has logits.
        group: ranks of the pipeline.
    """
    layers = [Range(rank, rank + 1) for rank in range(group.size)]
    communicator = PipelineCommunicator(group, case["hidden_size"], mx.float32, layers)
    communicator.set_captured_layers(range(group.size))
    tokens = mx.zeros((1, case["num_tokens"]), mx.int32)
    found: list[CapturedStates | None] = []
    hidden = tokens
    for step in range(case["num_steps"]):
        communicator.set_header(0, 0)
        x = mx.full((*tokens.shape, case["hidden_size"]), float(step))
        x = x if group.rank == 0 else communicator.recv_from_previous_stage(tokens)
        found.append(communicator.capture([x]))
        hidden = communicator.send_to_next_stage(x + 1, tokens, int(step == case["num_steps"] - 1))
        mx.eval(hidden)
    if group.rank == 0:
        mx.eval(communicator.recv_last_hidden(hidden))
    return [np.array(each.array()) for each in found if each is not None]


def run_steps(model: Model, tokens: mx.array, steps: list[list[tuple[int, int]]]) -> list[CapturedStates | None]:
    """Run steps of one or two sequences; return what each captured."""
    communicator = model.communicator if isinstance(model.communicator, RankCommunicator) else None
    caches = [model.make_cache(), model.make_cache()]
    found: list[CapturedStates | None] = []
    for parts in steps:
        if communicator is not None:
            communicator.set_header(0, 0)
        slices = [SequenceSlice(cache, *part) for cache, part in zip(caches, parts, strict=False)]
        hidden = model.hidden(tokens[:, : sum(length for length, _ in parts)], slices)
        found.append(model.captured)
        has_logits = any(num_logits for _, num_logits in parts)
        if communicator is not None and not has_logits:
            communicator.finish_step(hidden)
            mx.eval(communicator.header.arrays)
        output = model.logits(hidden) if model.has_head and has_logits else hidden
        mx.eval(output, [cache.state for each in caches for cache in each])
    return found


if __name__ == "__main__":
    main()
