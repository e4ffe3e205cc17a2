"""One rank of a ring, configured by MLX's variables, that answers the same requests in several placements.

Reads a list of cases from standard input, prints the answers to each as a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.request import Finished, Request, Token
from kimi_mlx.errors import EngineError
from kimi_mlx.model.config import load_config
from kimi_mlx.parallel.group import Group, MlxGroup
from kimi_mlx.rank.rendezvous import pin_to_cpu
from kimi_mlx.runtime.load import load_share, prepare_device

CHUNK = 16
"""Tokens per prefill step: fewer than in a prompt."""

CANCEL_AFTER = 20
"""Number of steps since the last request began."""

Answers = list[list[int]]


def main() -> None:
    """Join the ring and run the cases."""
    cases = json.load(sys.stdin)
    prepare_device(has_sampling=False)
    pin_to_cpu((int(os.environ["MLX_RANK"]), int(sys.argv[1])))
    group = MlxGroup(mx.distributed.init(strict=True, backend="ring"))
    for case in cases:
        print(json.dumps(answer(case, group)), flush=True)


def answer(case: dict[str, Any], group: Group | None) -> Answers:
    """Return the answers to a case's requests: the first one alone, then all at the same time.

    Args:
        case: `folder`, `strategy`, `requests`, `speculate`.
        group: None for one process alone.
    """
    folder = Path(case["folder"])
    model = load_share(folder, load_config(folder), "float32", group, strategy=case["strategy"])
    engine = Engine(model, prefill_chunk=CHUNK, speculate=case["speculate"])
    requests = dict(enumerate(map(Request.from_dict, case["requests"])))
    alone = tokens(engine, {0: requests[0]})[0]
    engine.clear()
    return [alone, *tokens(engine, requests).values()]


def tokens(engine: Engine, requests: dict[int, Request]) -> dict[int, list[int]]:
    """Return each request's answer, with a mark if it is stopped; each begins one step after the previous one.

    Of several the one with the highest number is cancelled when it has had some turns.
    """
    found: dict[int, list[int]] = {number: [] for number in requests}
    cancelled, turns = len(requests) - 1, 0
    waiting = list(requests.items())
    while waiting or not engine.is_idle:
        if waiting:
            engine.add(*waiting.pop(0))
            with contextlib.suppress(EngineError):  # a refused one between them
                engine.add(-1, Request(()))
        for number, event in engine.step():
            if isinstance(event, Token):
                found[number].append(event.id)
            elif isinstance(event, Finished) and event.reason != "length":
                found[number].append({"stop": -1, "cancelled": -2}[event.reason])
        turns += not waiting
        if cancelled and turns == CANCEL_AFTER:
            engine.cancel(cancelled)
    return found


if __name__ == "__main__":
    main()
