"""One rank of a ring that answers the same requests in one placement after the other, as MLX's variables say.

Reads a list of cases from standard input, prints the tokens of each case, and a summary of what this rank said.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from kimi_mlx.engine.generate import Engine
from kimi_mlx.engine.request import Finished, Request, Token
from kimi_mlx.errors import EngineError
from kimi_mlx.model.config import load_config
from kimi_mlx.parallel.group import Group, MlxGroup
from kimi_mlx.runtime.joining import pin
from kimi_mlx.runtime.load import load_share, prepare_device

CHUNK = 16
"""Tokens a prefill step: less than a prompt has."""

Answers = dict[str, list[int]]


def main() -> None:
    """Join, and work through the cases."""
    cases = json.load(sys.stdin)
    prepare_device(samples=False)
    pin((int(os.environ["MLX_RANK"]), int(sys.argv[1])))
    group = MlxGroup(mx.distributed.init(strict=True, backend="ring"))
    for case in cases:
        print(json.dumps(answer(case, group)), flush=True)


def answer(case: dict[str, Any], group: Group | None) -> Answers:
    """The answers to a case's requests, first one by one, then all at the same time.

    Args:
        case: `folder`, `strategy`, `requests`, and of which of them (by place) are stopped after so many tokens.
        group: None for one process alone.
    """
    folder = Path(case["folder"])
    model = load_share(folder, load_config(folder), "float32", group, strategy=case["strategy"])
    counts: dict[int, int] = {}
    limits = {int(number): limit for number, limit in case.get("stops", {}).items()}
    is_cancelled = lambda number: counts.get(number, 0) >= limits.get(number, 1 << 30)  # noqa: E731
    engine = Engine(model, is_cancelled, prefill_chunk=CHUNK)
    requests = [Request.from_dict(each) for each in case["requests"]]
    answers = {f"alone {number}": tokens(engine, {number: request})[number] for number, request in enumerate(requests)}
    engine.clear()
    counts.clear()
    together = tokens(engine, dict(enumerate(requests)), counts)
    return answers | {f"together {number}": ids for number, ids in together.items()}


def tokens(engine: Engine, requests: dict[int, Request], counts: dict[int, int] | None = None) -> dict[int, list[int]]:
    """What each request is answered; one that comes later than the others, too, and a refused one between."""
    found: dict[int, list[int]] = {number: [] for number in requests}
    counts = {} if counts is None else counts
    waiting = list(requests.items())
    while waiting or not engine.is_idle:
        if waiting:
            engine.add(*waiting.pop(0))
            try:
                engine.add(-1, Request(()))
            except EngineError:
                pass
        for number, event in engine.turn():
            if isinstance(event, Token):
                found[number].append(event.id)
                counts[number] = len(found[number])
            elif isinstance(event, Finished) and event.reason != "length":
                found[number].append({"stop": -1, "cancelled": -2}[event.reason])
    return found


if __name__ == "__main__":
    main()
