#!/usr/bin/env python3
"""Benchmark of pauses: the longest pause of a running answer while long prompts are added to the engine.

python scripts/bench_engine_pauses.py                   all cases, on kimi-mini with a context of 256k tokens
python scripts/bench_engine_pauses.py 64 prefix         cases whose names have these words

One answer runs without end on an engine in this process. For each case a line shows the longest time to add a request,
the longest time to choose the requests of a step, and the longest time between two tokens of the answer, which
contains a step with a chunk of a prompt; last the longest processor time of this process between two tokens, which
depends less on what else runs. scripts/bench_pauses.py has heavy requests over HTTP.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import kimi_mlx
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Token
from kimi_mlx.engine.request import Request
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.load import load_share, prepare_device

CONTEXT = 1 << 18
SPECULATE = 8
STEPS = 25
"""Number of steps that are watched after the last request."""


def prompt(length: int, last: int = 0) -> tuple[int, ...]:
    """Return a prompt without repetitions nearby."""
    return (*(20 + at * at % 1499 for at in range(length)), 20 + last)


CASES: dict[str, list[Request]] = {
    "one prompt of 2k tokens": [Request(prompt(2_000), max_tokens=1)],
    "one prompt of 128k tokens": [Request(prompt(128_000), max_tokens=1)],
    "64 prompts with a common prefix of 100k tokens": [Request(prompt(100_000, at), max_tokens=1) for at in range(64)],
}


class Stopwatch:
    """Measures the longest call of a function."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its calls timed."""

        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args)
            if hasattr(result, "__next__"):
                result = iter(list(result))
            self.longest_s = max(self.longest_s, time.perf_counter() - begin)
            return result

        return call


def measure(folder: Path, requests: list[Request]) -> str:
    """Add a request per step to an engine with a running answer; return the longest times as text."""
    engine = Engine(load_share(folder, load_config(folder)), speculate=SPECULATE, cache_bytes=8 * 10**9)
    adding, admitting = Stopwatch(), Stopwatch()
    engine.add(0, Request(prompt(300), max_tokens=10**5))
    while engine.is_prefilling:
        list(engine.step())
    add, engine._admit = adding.timed(engine.add), admitting.timed(engine._admit)  # pyright: ignore[reportPrivateUsage]
    token_at, pause_s = time.perf_counter(), 0.0
    cpu_at, cpu_s = time.process_time(), 0.0
    for number in range(len(requests) + STEPS):
        if number < len(requests):
            add(1 + number, requests[number])
        for request_id, event in engine.step():
            if request_id == 0 and isinstance(event, Token):
                now, cpu = time.perf_counter(), time.process_time()
                token_at, pause_s = now, max(pause_s, now - token_at)
                cpu_at, cpu_s = cpu, max(cpu_s, cpu - cpu_at)
    times = (("add", adding.longest_s), ("choose", admitting.longest_s), ("pause", pause_s), ("cpu", cpu_s))
    return ", ".join(f"{name} {seconds * 1e3:8.2f} ms" for name, seconds in times)


def main(words: list[str]) -> None:
    """Run the cases whose names contain all words."""
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    prepare_device()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "kimi-mini"
        shutil.copytree(Path(kimi_mlx.__file__).parent / "models" / "kimi-mini", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
        for name, requests in CASES.items():
            if all(word in name for word in words):
                print(f"{name:50} {measure(folder, requests)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
