"""One rank's process of the doctor's self-test: joins the others, sums and gathers what must come out exactly.

Started under kimi_mlx.cluster.guard by kimi_mlx.cluster.self_test, which says what the messages are. It has no limits
of its own: whoever started it sees how far it is, twice a second, and closes its input.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import mlx.core as mx

from kimi_mlx.cluster.backends import backend_variables
from kimi_mlx.cluster.launch import available_processors, processor_of
from kimi_mlx.cluster.messages import decode, encode
from kimi_mlx.cluster.payloads import Payload, p99
from kimi_mlx.cluster.self_test import STARTING
from kimi_mlx.parallel.group import Group, MlxGroup, SingleGroup

BEAT_S = 0.5
"""How often a rank says how far it is."""

ROUNDS = 4
"""How often each payload is checked, in turns with the others."""

EXACT_LIMIT = 256
"""Whole numbers up to this are exact in bfloat16."""

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


@dataclass
class Progress:
    """How far a rank is; another thread tells the front."""

    sink: BinaryIO
    step: str = STARTING
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, kind: str, **fields: object) -> None:
        """Write a message."""
        with self.lock:
            self.sink.write(encode(kind, **fields))
            self.sink.flush()

    def beat(self) -> None:
        """Tell how far it is, for ever."""
        while True:
            time.sleep(BEAT_S)
            self.send("at", step=self.step, done=self.done)


def main() -> None:
    """Run the test; the exit code is 1 after an error."""
    progress = Progress(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # whatever a library prints must not get between the messages
    code = 1
    try:
        start = decode(sys.stdin.buffer.readline())
        os.environ.update(start["environment"])
        threading.Thread(target=progress.beat, daemon=True).start()
        run(progress, start)
        code = 0
    except RuntimeError as error:  # MLX's; the front shows the last lines of what is written here
        print(error, file=sys.stderr)
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # MLX's threads may wait for a peer


def run(progress: Progress, start: Mapping[str, Any]) -> None:
    """Listen, join, check, time; says `listening`, `joined` and `done`."""
    ports: list[int] = []
    for address in start["addresses"]:
        try:
            ports.append(free_port(address))
        except OSError as error:
            progress.send("refused", error=f"cannot listen on {address}: {error.strerror}")
            return
    progress.send("listening", ports=ports)
    group = join(decode(sys.stdin.buffer.readline()), start)
    device = str(mx.default_device()).removeprefix("Device").strip("()")
    progress.send("joined", device=device.partition(",")[0])
    payloads = [Payload.from_dict(value) for value in start["payloads"]]
    wrong = check(group, payloads, progress)
    progress.send("done", wrong=wrong, timings=measure(group, payloads, progress))


def free_port(address: str) -> int:
    """A port of this address that nobody listens on now; another process may still take it."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def join(ring: Mapping[str, Any], start: Mapping[str, Any]) -> Group:
    """The group of all ranks; of one alone without MLX's distributed part."""
    if start["size"] == 1:
        return SingleGroup()
    place, places = start["place"]
    if (processor := processor_of(place, places, available_processors())) is not None:
        os.sched_setaffinity(0, {processor})
    handle, name = tempfile.mkstemp(suffix=".json")  # in the guard's folder, which goes with it
    with os.fdopen(handle, "w") as file:
        file.write(ring["file"])
    os.environ.update(backend_variables(ring["backend"], start["rank"], name, ring["coordinator"]))
    group = mx.distributed.init(strict=True, backend="ring" if ring["backend"] == "ring" else "jaccl")
    os.unlink(name)
    return MlxGroup(group)


def pattern(payload: Payload, rank: int, turn: int, size: int) -> mx.array:
    """What a rank sends: whole numbers, other ones each time, whose sum over the ranks is exact in every type."""
    most = max(EXACT_LIMIT // size, 2)
    numbers = mx.arange(payload.tokens * payload.width, dtype=mx.int32)
    mixed = numbers * (2 * rank + 3) + numbers // 5 * (rank + 1) + 5 * turn
    return (mixed % most).reshape(payload.tokens, payload.width)


def expected(payload: Payload, turn: int, size: int) -> mx.array:
    """What every rank must get, as whole numbers."""
    parts = [pattern(payload, rank, turn, size) for rank in range(size)]
    stacked = mx.stack(parts)
    return stacked.sum(axis=0) if payload.kind == "sum" else stacked


def collective(group: Group, payload: Payload, x: mx.array) -> mx.array:
    """The collective as a model has it: of what was just computed, and computed with at once."""
    return (group.sum(x + 0) if payload.kind == "sum" else group.gather(x + 0)) + 0


def compare(group: Group, payload: Payload, turn: int, result: mx.array) -> dict[str, Any] | None:
    """What is wrong with a result: how many values, and of a gather which ranks' parts; None if nothing is."""
    is_wrong = result.astype(mx.float32) != expected(payload, turn, group.size).astype(mx.float32)
    count = int(cast(int, is_wrong.sum().item()))
    if not count:
        return None
    rows = cast("list[bool]", is_wrong.any(axis=(1, 2)).tolist()) if payload.kind == "gather" else []
    sources = [rank for rank, row in enumerate(rows) if row]
    return {"payload": payload.name, "count": count, "of": is_wrong.size, "sources": sources}


def check(group: Group, payloads: list[Payload], progress: Progress) -> list[dict[str, Any]]:
    """Every payload in turns, several rounds; what was wrong, at most once a payload."""
    wrong: dict[str, dict[str, Any]] = {}
    for turn in range(ROUNDS):
        for payload in payloads:
            if turn >= payload.repeats:
                continue
            progress.step = payload.name
            x = pattern(payload, group.rank, turn, group.size).astype(DTYPES[payload.dtype])
            mx.eval(x)
            result = collective(group, payload, x)
            mx.eval(result)
            progress.done += 1
            found = compare(group, payload, turn, result)
            if found is not None:
                wrong.setdefault(payload.name, found)
    return list(wrong.values())


def measure(group: Group, payloads: list[Payload], progress: Progress) -> list[dict[str, float]]:
    """The median and the 99th percentile of each payload's time, in turns with the others."""
    inputs = [pattern(each, group.rank, 0, group.size).astype(DTYPES[each.dtype]) for each in payloads]
    mx.eval(inputs)
    seconds: list[list[float]] = [[] for _ in payloads]
    for turn in range(max(each.repeats for each in payloads)):
        for payload, x, taken in zip(payloads, inputs, seconds, strict=True):
            if turn >= payload.repeats:
                continue
            progress.step = payload.name
            begin = time.perf_counter()
            mx.eval(collective(group, payload, x))
            taken.append(time.perf_counter() - begin)
            progress.done += 1
    return [{"median_s": statistics.median(each), "p99_s": p99(each), "count": len(each)} for each in seconds]
