"""mlx-lm as a side of a benchmark: its processes (kimi_mlx.bench.mlx_lm_rank) as the front sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

from kimi_mlx.bench.sides import Answer
from kimi_mlx.cluster.messages import Message, decode_error
from kimi_mlx.cluster.ring import Ring
from kimi_mlx.engine.request import Request, Statistics
from kimi_mlx.errors import RingError
from kimi_mlx.runtime.session import SessionOptions

MODES: Mapping[bool, tuple[str, ...]] = {False: ("single",), True: ("tensor", "pipeline")}
"""How mlx-lm runs a model on one process, and the ways it has to share one among several."""


class MlxLmSide:
    """mlx-lm on a ring (or in one process) of its own."""

    def __init__(self, mode: str, ring: Ring):
        self.name = "mlx-lm" if mode == "single" else f"mlx-lm {mode}"
        self._ring = ring
        self._number = 0

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return self._ring.pids

    def wait_until_ready(self) -> None:
        """Wait until every rank has loaded its share.

        Raises:
            KimiMlxError: mlx-lm cannot load the model, or cannot share it in this mode.
        """
        for _ in self._answers("ready"):
            pass

    def run(self, request: Request) -> Answer:
        """Answer a request; every rank is idle when this returns."""
        self._number += 1
        self._ring.send("request", number=self._number, request=request.to_dict())
        results = dict(self._answers("finished"))
        return Answer(tuple(results[0]["ids"]), Statistics.from_dict(results[0]["statistics"]))

    def _answers(self, kind: str) -> Iterator[tuple[int, Message]]:
        """The messages of a kind, one of each rank."""
        waiting = set(range(self._ring.world_size))
        for rank, message in self._messages():
            if message["kind"] == "refused":
                raise decode_error(message)
            if message["kind"] == kind:
                waiting.discard(rank)
                yield rank, message
            if not waiting:
                return

    def _messages(self) -> Iterator[tuple[int, Message]]:
        try:
            yield from self._ring.messages()
        except RingError as error:
            raise RingError(f"mlx-lm: {error.message}", error.hint, error.rank) from error


@contextmanager
def open_mlx_lm(options: SessionOptions, mode: str) -> Iterator[MlxLmSide]:
    """Load mlx-lm's side.

    Args:
        options: the same as for kimi-mlx's side.
        mode: one of MODES.

    Raises:
        KimiMlxError: mlx-lm cannot load the model, or cannot share it in this mode.
    """
    with closing(Ring(options.where, module="kimi_mlx.bench.mlx_lm_rank")) as ring:
        ring.start(folder=str(options.folder), dtype=options.dtype, mode=mode)
        side = MlxLmSide(mode, ring)
        side.wait_until_ready()
        yield side
