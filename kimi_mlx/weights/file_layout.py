"""How a safetensors file that we write begins, and where each tensor lies in it.

Source of the format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from kimi_mlx.weights.index import DTYPE_BYTES

ALIGNMENT = 64
"""The data of a file starts at a multiple of this."""


@dataclass(frozen=True)
class FileLayout:
    """A file of known tensors.

    Args:
        header: its first bytes.
        starts: first byte of each tensor, by name.
        size_bytes: of the whole file.
    """

    header: bytes
    starts: dict[str, int]
    size_bytes: int


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> FileLayout:
    """The layout of tensors one behind the other.

    Args:
        tensors: name, type in safetensors' words, shape.
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
