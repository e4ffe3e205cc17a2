"""Measure a layer of a model and messages of its size on the ranks of a cluster, in separate processes."""

from __future__ import annotations

import time
from contextlib import closing

from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.cluster.hosts.host import Cluster
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.cluster.ring.watch import RingTimeouts
from kimi_mlx.planner.calibration import Calibration, dimensions
from kimi_mlx.planner.model_shape import ModelShape

MODULE = "kimi_mlx.rank.calibrate"
"""Module that each rank's process runs."""

STALL_S = 120.0
"""Time limit of the whole measurement after the ranks have connected."""


def calibrate(cluster: Cluster, shape: ModelShape, dtype: str | None = None) -> Calibration:
    """Measure on all ranks at the same time. It leaves no process on any host, even if it fails.

    Args:
        cluster: hosts and addresses of the ranks.
        shape: dimensions of the model; its files are not needed.
        dtype: compute dtype; None for the default of the ranks' device.

    Raises:
        KimiMlxError: a rank cannot be started or is lost.
    """
    begin = time.monotonic()
    with closing(Ring(cluster, RingTimeouts(stall_s=STALL_S), MODULE)) as ring:
        ring.start(dimensions=dimensions(shape), dtype=dtype)
        done: dict[int, Message] = {}
        for rank, message in ring.messages():
            if message["kind"] == "done":
                done[rank] = message
            if len(done) == ring.world_size:
                break
    reports = [done[rank] for rank in range(cluster.size)]
    return Calibration.of_ranks(shape.layers, reports, time.monotonic() - begin)
