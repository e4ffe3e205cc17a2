"""Limits of images and videos. They are checked before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_mlx.units import MB


@dataclass(frozen=True)
class MediaLimits:
    """Limits of the images and videos of one prompt.

    Decoding takes up to 8 bytes per pixel. Images are decoded one at a time, videos four frames at a time.

    Args:
        max_images: number of images in a prompt; each chunk of a video counts as one.
        max_prepared_bytes: size of all patches of a prompt: 588 bytes each, 2,352 per token of an image.
        max_bytes: size of an image file.
        max_pixels: width times height of an image. Not above PIL's own limit, 89,478,485.
        max_side: width or height of an image or of a video frame, in pixels.
        max_video_bytes: size of a video file.
        max_frame_pixels: width times height of a frame of a video; 8K video has 35 million.
        max_video_s: duration of a video, in seconds.
        max_video_frames: number of frames of a video before sampling.
    """

    max_images: int = 100
    max_prepared_bytes: int = 400 * MB
    max_bytes: int = 32 * MB
    max_pixels: int = 80_000_000
    max_side: int = 100_000
    max_video_bytes: int = 100 * MB
    max_frame_pixels: int = 36_000_000
    max_video_s: float = 120.0
    max_video_frames: int = 20_000


DEFAULT_LIMITS = MediaLimits()
