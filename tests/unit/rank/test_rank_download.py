"""The process of a rank during a download."""

from __future__ import annotations

import io

from kimi_mlx.cluster.channel.messages import decode
from kimi_mlx.hub.retries import LOG
from kimi_mlx.rank.channel import Channel
from kimi_mlx.rank.download import WaitReporter


def test_waits_for_the_hub_are_reported_to_the_front() -> None:
    sink = io.BytesIO()
    reporter = WaitReporter(Channel(io.BytesIO(), sink))
    LOG.addHandler(reporter)
    try:
        LOG.warning("waiting: status %d", 503)
    finally:
        LOG.removeHandler(reporter)
    assert decode(sink.getvalue()) == {"kind": "waiting", "text": "waiting: status 503"}
