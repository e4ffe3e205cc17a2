"""Send the patches of images to rank 0, in small messages, so that they never hold up other messages."""

from __future__ import annotations

import base64
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from kimi_mlx.cluster.channel.messages import encode
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.engine.request import ImageInput

PART_BYTES = 192 << 10
"""Bytes of patches in a message; 256 KiB as base64."""

MAX_UNSENT = 2
"""Maximum number of unsent messages to rank 0. A message of another request waits for these."""

POLL_INTERVAL_S = 0.002
"""Interval at which the number of unsent messages is checked."""


class ImageUploader:
    """Keeps track of the images whose patches rank 0 holds: those of unfinished requests.

    Each start of a ring has an uploader of its own.

    Args:
        ring: the ring.
    """

    def __init__(self, ring: Ring):
        self._ring = ring
        self._is_closed = False
        self._lock = threading.Lock()
        self._num_requests: Counter[str] = Counter()
        """Number of requests that need the patches, by digest."""

    def close(self) -> None:
        """Send nothing more: the ring is lost."""
        with self._lock:
            self._is_closed = True

    def upload(self, images: Sequence[ImageInput], is_over: Callable[[], bool]) -> bool:
        """Send the patches that rank 0 lacks; they stay there until `release`.

        Args:
            images: images of a request.
            is_over: function that returns True to stop.

        Returns:
            True if all were sent; otherwise rank 0 keeps none of them.
        """
        for index, image in enumerate(images):
            with self._lock:
                is_held = image.digest in self._num_requests
                self._num_requests[image.digest] += 1
            if is_held:
                continue
            for line in encode_patches(image):
                while self._ring.num_unsent(0) >= MAX_UNSENT and not is_over():
                    time.sleep(POLL_INTERVAL_S)
                if is_over():
                    self.release(images[: index + 1])
                    return False
                with self._lock:
                    self._write(line)
        return True

    def release(self, images: Sequence[ImageInput]) -> None:
        """Let rank 0 drop patches that no other request needs."""
        with self._lock:
            for image in images:
                self._num_requests[image.digest] -= 1
                if not self._num_requests[image.digest]:
                    del self._num_requests[image.digest]
                    self._write(encode("drop_patches", digest=image.digest))

    def _write(self, line: bytes) -> None:
        if not self._is_closed:
            self._ring.write_to(0, line)


def encode_patches(image: ImageInput) -> Iterator[bytes]:
    """Yield the messages with the patches of an image."""
    assert image.patches is not None
    data = memoryview(image.patches.tobytes())
    for start in range(0, len(data), PART_BYTES):
        part = base64.b64encode(data[start : start + PART_BYTES]).decode()
        yield encode("patches", digest=image.digest, shape=image.patches.shape, data=part)
