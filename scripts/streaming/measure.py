"""Runs of the streaming benchmark: each in a new process, with the page cache dropped before; the sides alternate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, get_args

from kimi_mlx.errors import EngineError, UsageError
from kimi_mlx.units import MB, format_bytes
from scripts.loading.files import drop_caches
from scripts.streaming.files import StreamingFiles
from scripts.streaming.memory_group import memory_group
from scripts.streaming.worker import SideName, WorkerOptions, WorkerResult

SIDES: tuple[SideName, ...] = ("kimi-mlx", "plain LRU", "memory map", "resident")

PROCESS_BYTES = 128 * MB
"""Part of the limit for Python, libraries and temporary arrays."""

LEARN_TOKENS, LEARN_SEED = 200, 12345
"""Tokens of the run that learns the use of experts; other ones than those that are measured."""

RUN_LIMIT_S = 1800.0
"""Time limit of a run."""

FAILED_TAIL = 400
"""Characters of a failed process's errors that are shown."""


@dataclass(frozen=True)
class Memory:
    """Memory of a run.

    Args:
        limit_bytes: limit of the whole process.
        rest_bytes: what every token needs: all weights but the routed experts.
    """

    limit_bytes: int
    rest_bytes: int

    @property
    def expert_bytes(self) -> int:
        """Bytes for experts, of the sides that stream."""
        return self.limit_bytes - self.rest_bytes - PROCESS_BYTES

    @classmethod
    def of(cls, files: StreamingFiles, share: float) -> Memory:
        """Return the memory of a share of the checkpoint's size.

        Raises:
            UsageError: it is too little for any experts.
        """
        experts = [file.experts for file in files.manifest.files if file.experts is not None]
        all_bytes = sum(each.num_experts * each.record.record_bytes for each in experts)
        memory = cls(int(files.size_bytes * share), files.size_bytes - all_bytes)
        fewest = 32 * max(each.record.record_bytes for each in experts)
        if memory.expert_bytes < fewest:
            raise UsageError(
                f"{format_bytes(memory.limit_bytes)} leave {format_bytes(max(memory.expert_bytes, 0))} for experts, "
                f"not {format_bytes(fewest)}",
                hint="use a larger --size-gb",
            )
        return memory


@dataclass(frozen=True)
class StreamingRun:
    """One run.

    Args:
        side: side, or `disk`.
        repetition: number of the repetition, from 0.
        result: figures of the process.
        is_limited: whether a control group limited its memory.
        group_peak_bytes: highest use of the group, page cache included; None if not known.
        caches: method by which the page cache was dropped before.
        load_average: load of the machine before, over 1 minute.
    """

    side: SideName
    repetition: int
    result: WorkerResult
    is_limited: bool
    group_peak_bytes: int | None
    caches: str
    load_average: float

    @property
    def tok_per_s(self) -> float:
        """Rate of the timed tokens."""
        return len(self.result.seconds) / sum(self.result.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return the run for JSON."""
        return asdict(self)


def measure_streaming(
    files: StreamingFiles,
    memory: Memory,
    *,
    warmup: int,
    tokens: int,
    repeat: int,
    show: Callable[[str], None] = lambda text: None,
) -> list[StreamingRun]:
    """Learn the use of experts if that was not done, then run the disk and all sides in turns.

    Args:
        files: files of the benchmark.
        memory: memory of each run.
        warmup: number of tokens before the clock starts.
        tokens: number of timed tokens.
        repeat: number of repetitions.
        show: callback with a text for people, before each run.

    Raises:
        EngineError: a process has failed.
    """

    def run(side: SideName, repetition: int, *counts: int) -> StreamingRun:
        show(f"{side}, repetition {repetition + 1} of {repeat}" if side != "learn" else "learning the use of experts")
        return _run(files, memory, side, repetition, *counts)

    if not files.use.is_file():
        run("learn", LEARN_SEED, 0, LEARN_TOKENS)
    runs: list[StreamingRun] = []
    for repetition in range(repeat):
        sides = ("disk", *SIDES)
        runs += [run(side, repetition, warmup, tokens) for side in (sides if repetition % 2 == 0 else sides[::-1])]
    return runs


def _run(
    files: StreamingFiles, memory: Memory, side: SideName, repetition: int, warmup: int, tokens: int
) -> StreamingRun:
    assert side in get_args(SideName)
    options = WorkerOptions(
        side, str(files.folder), str(files.use), memory.expert_bytes, warmup, tokens, seed=repetition
    )
    command = [sys.executable, "-m", "scripts.streaming.worker", json.dumps(asdict(options))]
    load_average, caches = os.getloadavg()[0], drop_caches([files.folder])
    if side in ("resident", "disk"):
        return StreamingRun(side, repetition, _result(side, command), False, None, caches, load_average)
    with memory_group(memory.limit_bytes) as group:
        result = _result(side, command if group is None else group.command(command))
        peak = None if group is None else group.peak_bytes
    return StreamingRun(side, repetition, result, group is not None, peak, caches, load_average)


def _result(side: str, command: list[str]) -> WorkerResult:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"the run of `{side}` took more than {RUN_LIMIT_S:.0f} s", hint="use fewer tokens") from error
    if done.returncode:
        raise EngineError(
            f"the run of `{side}` failed with exit code {done.returncode}: {done.stderr[-FAILED_TAIL:].strip()}",
            hint="exit code 137 or -9: the limit of memory was reached",
        )
    return WorkerResult(**json.loads(done.stdout))
