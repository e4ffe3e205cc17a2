"""mlx-lm as a side of a benchmark: the front of its processes (kimi_mlx.bench.mlx_lm_rank)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

from kimi_mlx.bench.sides import BatchResult, RequestBatch, TimedAnswer
from kimi_mlx.cluster.channel.messages import Message, decode_error
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.engine.events import Statistics
from kimi_mlx.errors import RingError
from kimi_mlx.session.session import SessionOptions

MODES: Mapping[str, Sequence[str]] = {
    "mlx-lm": ("tensor", "pipeline"),
    "mlx-lm-tensor": ("tensor",),
    "mlx-lm-pipeline": ("pipeline",),
}
"""Modes of mlx-lm on several ranks, by value of `--against`. In one process its mode is `single`."""


class MlxLmSide:
    """mlx-lm on a ring (or in one process) of its own."""

    def __init__(self, mode: str, ring: Ring):
        self.name = "mlx-lm" if mode == "single" else f"mlx-lm {mode}"
        self.not_batched_because = None if mode == "single" else "its batch generator supports only one process"
        self._ring = ring

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return self._ring.pids

    def wait_until_ready(self) -> None:
        """Wait until every rank has loaded its share.

        Raises:
            KimiMlxError: mlx-lm cannot load the model, or cannot split it in this mode.
        """
        for _ in self._messages("ready"):
            pass

    def run(self, batch: RequestBatch) -> BatchResult:
        """Run a batch; return when every rank is idle."""
        self._ring.send("fill", prefix=batch.prefix, copies=len(batch.requests))
        for _ in self._messages("filled"):
            pass
        ids: list[list[int]] = [[] for _ in batch.requests]
        arrivals: list[list[float]] = [[] for _ in batch.requests]
        results: dict[int, Message] = {}
        started = time.perf_counter()
        self._ring.send("batch", requests=[request.to_dict() for request in batch.requests], depth=batch.depth)
        for rank, message in self._messages("finished"):
            if message["kind"] == "finished":
                results[rank] = message
            elif message["kind"] == "token":
                ids[message["request_id"]].append(message["id"])
                arrivals[message["request_id"]].append(time.perf_counter() - started)
        answers = [
            TimedAnswer(tuple(tokens), Statistics.from_dict(statistics), tuple(times))
            for tokens, statistics, times in zip(ids, results[0]["statistics"], arrivals, strict=True)
        ]
        peaks = [results[rank]["peak_memory_bytes"] for rank in sorted(results)]
        return BatchResult(tuple(answers), started, tuple(peaks))

    def _messages(self, last: str) -> Iterator[tuple[int, Message]]:
        """Yield (rank, message) until each rank has sent a message of the kind `last`."""
        waiting = set(range(self._ring.world_size))
        try:
            for rank, message in self._ring.messages():
                if message["kind"] == "refused":
                    raise decode_error(message)
                yield rank, message
                if message["kind"] == last:
                    waiting.discard(rank)
                if not waiting:
                    return
        except RingError as error:
            raise RingError(f"mlx-lm: {error.message}", error.hint, error.rank) from error


@contextmanager
def open_mlx_lm(options: SessionOptions, mode: str) -> Iterator[MlxLmSide]:
    """Load mlx-lm.

    Args:
        options: the same options as for kimi-mlx.
        mode: a mode of MODES, or `single`.

    Raises:
        KimiMlxError: mlx-lm cannot load the model, or cannot split it in this mode.
    """
    with closing(Ring(options.effective_cluster, module="kimi_mlx.bench.mlx_lm_rank")) as ring:
        ring.start(folder=str(options.folder), dtype=options.dtype, mode=mode)
        side = MlxLmSide(mode, ring)
        side.wait_until_ready()
        yield side
