"""Layout of a new safetensors file: its header and the start of each tensor.

Source of the format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from kimi_mlx.weights.index import DTYPE_BYTES

ALIGNMENT = 64
"""Alignment in bytes of the start of the data."""


@dataclass(frozen=True)
class FileLayout:
    """Layout of one file.

    Args:
        header: first bytes of the file.
        starts: name of a tensor -> its first byte.
        size_bytes: size of the whole file.
    """

    header: bytes
    starts: dict[str, int]
    size_bytes: int


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> FileLayout:
    """Return the layout of consecutive tensors.

    Args:
        tensors: (name, type as safetensors names it, shape) of each tensor.
    """
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offsets: dict[str, int] = {}
    offset = 0
    for name, dtype, shape in tensors:
        offsets[name] = offset
        end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    data = 8 + len(text)
    starts = {name: data + start for name, start in offsets.items()}
    return FileLayout(len(text).to_bytes(8, "little") + text, starts, data + offset)
