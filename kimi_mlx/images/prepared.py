"""Images as the vision tower reads them: patches of pixels.

P: patches of an image or of a chunk of video frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from kimi_mlx.images.resize import CELL, MERGE, PATCH_SIZE, grid_size, resized_size

Pixels: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PreparedImage:
    """An image, or a chunk of up to four video frames, for the vision tower.

    Args:
        patches: (P, 3, 14, 14) uint8, read-only, the patches of each frame row by row; RGB. Padding is 0.
        grid: numbers of frames, rows of patches and columns of patches; their product is P.
        size: width and height of the image before resizing, in pixels, after its EXIF orientation is applied.
        digest: 32 hexadecimal digits of a hash of grid and patches.
    """

    patches: Pixels = field(repr=False, compare=False)
    grid: tuple[int, int, int]
    size: tuple[int, int]
    digest: str

    @property
    def num_tokens(self) -> int:
        """Number of tokens: 2x2 patches of all frames together become one."""
        return self.grid[1] * self.grid[2] // MERGE**2

    @property
    def num_bytes(self) -> int:
        """Bytes of the patches."""
        return self.patches.nbytes


def to_patches(frames: Sequence[Image.Image], max_patches: int, max_patches_per_side: int) -> PreparedImage:
    """Resize frames, pad them to whole cells with zeros, and cut them into patches.

    Args:
        frames: RGB images of one size, in the order of time.
        max_patches: limit of the number of whole patches of a frame.
        max_patches_per_side: limit of the patches in a row or column.

    Source: `navit_patchify` and `image_to_np` in the image processor that Moonshot publishes with Kimi K2.5.
    """
    width, height = resized_size(*frames[0].size, max_patches, max_patches_per_side)
    rows, columns = grid_size(width, height)
    padded: Pixels = np.zeros((len(frames), rows // MERGE * CELL, columns // MERGE * CELL, 3), np.uint8)
    for frame, pixels in zip(frames, padded, strict=True):
        pixels[:height, :width] = np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC))
    patches = padded.reshape(len(frames), rows, PATCH_SIZE, columns, PATCH_SIZE, 3)
    patches = np.ascontiguousarray(patches.transpose(0, 1, 3, 5, 2, 4))  # (frames, rows, columns, 3, 14, 14)
    patches.setflags(write=False)  # several prompts share it
    grid = (len(frames), rows, columns)
    return PreparedImage(patches.reshape(-1, 3, PATCH_SIZE, PATCH_SIZE), grid, frames[0].size, _digest(grid, patches))


def _digest(grid: tuple[int, int, int], patches: Pixels) -> str:
    digest = hashlib.blake2b(repr(grid).encode(), digest_size=16)
    digest.update(patches.data)
    return digest.hexdigest()
