"""Patches of images that rank 0 receives from the front, in parts."""

from __future__ import annotations

import base64
import math

import numpy as np
import numpy.typing as npt

from kimi_mlx.cluster.channel.messages import Message


class ReceivedPatches:
    """Patches by digest. The front sends them before the request that needs them, and later `drop_patches`."""

    def __init__(self) -> None:
        self._parts: dict[str, bytearray] = {}
        self.complete: dict[str, npt.NDArray[np.uint8]] = {}
        """Patches by digest, once all of their parts have arrived."""

    def on_message(self, message: Message) -> None:
        """Add a part (`patches`), or drop an image (`drop_patches`)."""
        digest = message["digest"]
        if message["kind"] == "drop_patches":
            self._parts.pop(digest, None)
            self.complete.pop(digest, None)
            return
        data = self._parts.setdefault(digest, bytearray())
        data += base64.b64decode(message["data"])
        if len(data) == math.prod(message["shape"]):
            self.complete[digest] = np.frombuffer(self._parts.pop(digest), np.uint8).reshape(message["shape"])
