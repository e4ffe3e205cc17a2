"""Prepare an image file for the vision tower."""

from __future__ import annotations

from kimi_mlx.images.decode import decode_image
from kimi_mlx.images.limits import DEFAULT_LIMITS, MediaLimits
from kimi_mlx.images.prepared import PreparedImage, to_patches


def prepare_image(data: bytes, place: str, limits: MediaLimits = DEFAULT_LIMITS) -> PreparedImage:
    """Decode an image file, and resize and cut it as Kimi K2.5 expects it.

    Args:
        data: contents of a PNG, JPEG, WebP, GIF, BMP or TIFF file, or of a HEIC file with the extra `heic`.
        place: name or location of the image, for error messages.
        limits: limits of its bytes and pixels.

    Raises:
        ImageError: the file is too large, broken or of an unknown format.
    """
    return to_patches([decode_image(data, place, limits)])
