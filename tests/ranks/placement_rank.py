"""One rank of a ring that answers the requests of several cases, such as one for each placement.

MLX's environment variables set the rank and the hostfile. The cases are a JSON list on standard input; the answers to
each are one line on standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from kimi_mlx.engine import engine as engine_module
from kimi_mlx.engine import shared_prefix
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import EngineError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.group import Group, MlxGroup
from kimi_mlx.parallel.sum_communicator import SumCommunicator
from kimi_mlx.parallel.tune_split import tune_query_split
from kimi_mlx.rank.rendezvous import pin_to_cpu
from kimi_mlx.runtime.load import load_share, prepare_device
from scripts.oracle import Oracle
from tests.drafters import RandomPlanner

CHUNK = 16
"""Tokens per prefill step; smaller than the long prompts."""

CANCEL_AFTER = 20
"""Number of steps after the last request was added."""

ACCEPTANCE = 0.7
"""Share of right draft tokens."""

Answers = list[list[int]]


def main() -> None:
    """Join the ring and answer the cases."""
    cases = json.load(sys.stdin)
    prepare_device()
    pin_to_cpu((int(os.environ["MLX_RANK"]), int(sys.argv[1])))
    group = MlxGroup(mx.distributed.init(strict=True, backend="ring"))
    for case in cases:
        print(json.dumps(answer(case, group)), flush=True)


def answer(case: dict[str, Any], group: Group | None) -> Answers:
    """Return the answers to a case's requests: to the first one alone, then to all at the same time.

    Args:
        case: `folder`, `strategy`, `requests`, `speculate`, `divides_queries`; with drafts also `answers`, which most
            draft tokens are of; with experts read from the disk also `expert_memory`.
        group: ranks that share the model; None for one process.
    """
    folder = Path(case["folder"])
    model = load_share(
        folder,
        load_config(folder),
        "float32",
        group,
        strategy=case["strategy"],
        expert_memory=case.get("expert_memory"),
    )
    if case["divides_queries"] and group is not None:
        divide_all_queries(model, group)
    requests = dict(enumerate(map(Request.from_dict, case["requests"])))
    drafters = None
    shared_prefix.MIN_SHARED_TOKENS = shared_prefix.SHARED_STEP = engine_module.MIN_SHARED_TOKENS = CHUNK
    if case["speculate"]:
        engine_module.DraftPlanner = RandomPlanner
        known = {request.prompt: case["answers"][number + 1] for number, request in requests.items()}
        drafters = [Oracle(known, ACCEPTANCE, model.config.vocab_size)]
    engine = Engine(model, prefill_chunk=CHUNK, speculate=case["speculate"], drafters=drafters)
    if case["speculate"]:
        engine.measure_steps()
    alone = generate(engine, {0: requests[0]})[0]
    engine.clear()
    answers = [alone, *generate(engine, requests).values()]
    model.close()
    return answers


def divide_all_queries(model: Model, group: Group) -> None:
    """Divide the queries of every step over the ranks, as if the link took no time."""
    tune_query_split(group, model, None)
    communicator = model.communicator
    assert isinstance(communicator, SumCommunicator)
    assert communicator.query_split is not None
    cost = replace(communicator.query_split.cost, read_s=0.0)
    communicator.query_split = replace(communicator.query_split, cost=cost, gathers=((1.0, 0.0),))


def generate(engine: Engine, requests: dict[int, Request]) -> dict[int, list[int]]:
    """Return the token ids of each answer, with -1 at the end if a stop token ended it, and -2 if it was cancelled.

    One request is added per step. If there are several, the last one is cancelled CANCEL_AFTER steps later.
    """
    answers: dict[int, list[int]] = {request_id: [] for request_id in requests}
    last_id, num_steps = len(requests) - 1, 0
    waiting = list(requests.items())
    while waiting or not engine.is_idle:
        if waiting:
            engine.add(*waiting.pop(0))
            with contextlib.suppress(EngineError):  # a refused request between the others
                engine.add(-1, Request(()))
        for request_id, event in engine.step():
            if isinstance(event, Token):
                answers[request_id].append(event.id)
            elif isinstance(event, Finished) and event.reason != "length":
                answers[request_id].append({"stop": -1, "cancelled": -2}[event.reason])
        num_steps += not waiting
        if last_id and num_steps == CANCEL_AFTER:
            engine.cancel(last_id)
    return answers


if __name__ == "__main__":
    main()
