"""Cache of prepared images and videos. Each turn of a chat sends all images of the conversation again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from kimi_mlx.images.data_url import read_data_url
from kimi_mlx.images.limits import DEFAULT_LIMITS, MediaLimits
from kimi_mlx.images.prepare import prepare_image
from kimi_mlx.images.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from kimi_mlx.images.video import MediaChunk, prepare_video
from kimi_mlx.units import MB

MAX_CACHED_BYTES = 256 * MB
"""Default size of the cache: 26 images of the largest size."""


class MediaCache:
    """Prepares images and videos, and keeps the latest ones. It can be used by several threads.

    `num_bytes` is the size of the patches that it holds.

    Args:
        preprocessing: settings of the checkpoint.
        limits: limits of each image and video.
        max_bytes: limit of the patches that are kept.
    """

    def __init__(
        self,
        preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
        limits: MediaLimits = DEFAULT_LIMITS,
        max_bytes: int = MAX_CACHED_BYTES,
    ):
        self._preprocessing = preprocessing
        self._limits = limits
        self._max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[bytes, Sequence[MediaChunk]] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self, kind: Literal["image", "video"], source: str | bytes, place: str) -> Sequence[MediaChunk]:
        """Return an image as one chunk, or the chunks of a video.

        Args:
            kind: `image` or `video`.
            source: data URL, or contents of the file.
            place: name or location of the image, for error messages.

        Raises:
            ImageError: the image or video cannot be read or exceeds a limit.
        """
        data = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
        key = kind.encode() + hashlib.sha256(data).digest()
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        chunks = self._prepare(kind, source, place)
        with self._lock:
            self._add(key, chunks)
        return chunks

    def _prepare(self, kind: Literal["image", "video"], source: str | bytes, place: str) -> Sequence[MediaChunk]:
        is_image = kind == "image"
        if isinstance(source, str):
            max_bytes = self._limits.max_bytes if is_image else self._limits.max_video_bytes
            source = read_data_url(source, place, max_bytes)
        if is_image:
            return [MediaChunk(prepare_image(source, place, self._limits, self._preprocessing))]
        return prepare_video(source, place, self._limits, self._preprocessing)

    def _add(self, key: bytes, chunks: Sequence[MediaChunk]) -> None:
        """Keep chunks, and evict the entries that were not used for the longest time."""
        if key not in self._entries:
            self.num_bytes += _num_bytes(chunks)
        self._entries[key] = chunks
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= _num_bytes(self._entries.popitem(last=False)[1])


def _num_bytes(chunks: Sequence[MediaChunk]) -> int:
    return sum(chunk.image.num_bytes for chunk in chunks)
