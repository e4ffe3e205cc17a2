"""Options of a session."""

from __future__ import annotations

import pytest

from kimi_mlx.cluster.hosts.host import local_cluster
from kimi_mlx.session.session import FAST_SYNC_CHECK_EVERY, SessionOptions


@pytest.mark.parametrize(
    ("options", "check_every"),
    [
        (SessionOptions(None, ranks=2), 0),
        (SessionOptions(None, ranks=2, fast_sync=True), FAST_SYNC_CHECK_EVERY),
        (SessionOptions(None, ranks=2, fast_sync=True, check_every=100), 100),
        (SessionOptions(None, cluster=local_cluster(2, fast_sync=True)), FAST_SYNC_CHECK_EVERY),
        (SessionOptions(None, cluster=local_cluster(2), check_every=3), 3),
    ],
)
def test_the_fast_fence_keeps_checks_on(options: SessionOptions, check_every: int) -> None:
    assert options.check_every == check_every
