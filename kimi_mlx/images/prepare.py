"""Prepare an image file for the vision tower."""

from __future__ import annotations

from kimi_mlx.images.decode import decode_image
from kimi_mlx.images.limits import DEFAULT_LIMITS, MediaLimits
from kimi_mlx.images.prepared import PreparedImage, to_patches
from kimi_mlx.images.preprocessing import DEFAULT_PREPROCESSING, Preprocessing


def prepare_image(
    data: bytes, place: str, limits: MediaLimits = DEFAULT_LIMITS, preprocessing: Preprocessing = DEFAULT_PREPROCESSING
) -> PreparedImage:
    """Decode an image file, and resize and cut it as the model expects it.

    Args:
        data: contents of a PNG, JPEG, WebP, GIF, BMP or TIFF file, or of a HEIC file with the extra `heic`.
        place: name or location of the image, for error messages.
        limits: limits of its bytes and pixels.
        preprocessing: settings of the checkpoint.

    Raises:
        ImageError: the file is too large, broken or of an unknown format.
    """
    image = decode_image(data, place, limits)
    return to_patches([image], preprocessing.in_patch_limit, preprocessing.patch_limit_on_one_side)
