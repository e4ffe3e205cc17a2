"""Patches on their way from the front to rank 0."""

from __future__ import annotations

from typing import cast

import numpy as np

from kimi_mlx.cluster.channel.messages import decode
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.rank.received_patches import ReceivedPatches
from kimi_mlx.session.image_upload import MAX_UNSENT, PART_BYTES, ImageUploader
from tests.images import make_image

LARGE, SMALL = make_image(1, (1, 24, 24)), make_image(2)


class Rank0:
    """The part of a ring that an uploader uses: rank 0, which receives a message whenever its queue is looked at."""

    def __init__(self) -> None:
        self.queue: list[bytes] = []
        self.lines: list[bytes] = []
        self.received = ReceivedPatches()

    def write_to(self, rank: int, line: bytes) -> None:
        assert rank == 0
        self.queue.append(line)

    def num_unsent(self, rank: int) -> int:
        assert len(self.queue) <= MAX_UNSENT
        if self.queue:
            self.lines.append(self.queue.pop(0))
            self.received.on_message(decode(self.lines[-1]))
        return len(self.queue)

    def drain(self) -> set[str]:
        """Receive everything; return the digests of the images that are complete."""
        while self.queue:
            self.num_unsent(0)
        assert not self.received._parts
        return set(self.received.complete)


def make_uploader() -> tuple[Rank0, ImageUploader]:
    rank = Rank0()
    return rank, ImageUploader(cast(Ring, rank))


def test_patches_arrive_in_small_messages_and_stay_until_nobody_needs_them() -> None:
    rank, uploader = make_uploader()
    assert uploader.upload([LARGE, SMALL, LARGE], lambda: False)
    assert rank.drain() == {LARGE.digest, SMALL.digest}
    assert LARGE.patches is not None
    assert np.array_equal(rank.received.complete[LARGE.digest], LARGE.patches)
    assert max(map(len, rank.lines)) < 1.4 * PART_BYTES
    num_lines = len(rank.lines)
    assert uploader.upload([SMALL], lambda: False)
    assert rank.drain() == {LARGE.digest, SMALL.digest}
    assert len(rank.lines) == num_lines  # not sent again
    uploader.release([LARGE, SMALL, LARGE])
    assert rank.drain() == {SMALL.digest}
    uploader.release([SMALL])
    assert rank.drain() == set()


def test_an_upload_that_is_stopped_leaves_nothing() -> None:
    for limit in range(3):
        rank, uploader = make_uploader()
        checks = iter(range(1000))
        assert not uploader.upload([SMALL, LARGE], lambda checks=checks, limit=limit: next(checks) >= limit)
        assert rank.drain() == set()
        assert uploader.upload([LARGE], lambda: False)
        assert rank.drain() == {LARGE.digest}


def test_after_the_loss_of_the_ring_nothing_is_sent() -> None:
    rank, uploader = make_uploader()
    assert uploader.upload([SMALL], lambda: False)
    rank.drain()
    uploader.close()
    uploader.release([SMALL])
    uploader.upload([LARGE], lambda: False)
    assert not rank.queue
