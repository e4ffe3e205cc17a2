"""Sample a video as Kimi expects it: two frames a second, in chunks of four with a time stamp."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from kimi_mlx.errors import ImageError
from kimi_mlx.images.data_url import too_large
from kimi_mlx.images.decode import check_size
from kimi_mlx.images.limits import DEFAULT_LIMITS, MediaLimits
from kimi_mlx.images.prepared import PreparedImage, to_patches
from kimi_mlx.images.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from kimi_mlx.install_command import install_command

SAVE_AGAIN_HINT = "open it in a player and save it again"
FORMATS = "mov,mp4,matroska,webm,avi"
"""FFmpeg's names of the formats that it may open. Some others are lists of further files, which it would open too."""


class MediaChunk(NamedTuple):
    """An image, or up to four frames of a video.

    Args:
        image: the prepared image or frames.
        time_stamp: time of the first frame of a video, `HH:MM:SS.mmm`; empty for an image.
    """

    image: PreparedImage
    time_stamp: str = ""


def prepare_video(
    data: bytes, place: str, limits: MediaLimits = DEFAULT_LIMITS, preprocessing: Preprocessing = DEFAULT_PREPROCESSING
) -> list[MediaChunk]:
    """Decode a video file and sample, resize and cut its frames.

    Args:
        data: contents of a file that FFmpeg reads, such as MP4, MOV, WebM or MKV.
        place: name or location of the video, for error messages.
        limits: limits of its bytes, duration, frames and pixels.
        preprocessing: settings of the checkpoint.

    Raises:
        ImageError: the extra `video` is not installed, or the file is too large, broken or of an unknown format.

    Source: `split_video_chunks` in the image processor that Moonshot publishes with Kimi K2.5.
    """
    if len(data) > limits.max_video_bytes:
        raise too_large(place, len(data), limits.max_video_bytes)
    try:
        av: Any = importlib.import_module("av")
    except ImportError as error:
        hint = f"run `{install_command('av')}`, or send single frames as images"
        raise ImageError(place, "videos need the package `av`, which is not installed", hint=hint) from error
    options = {"format_whitelist": FORMATS, "protocol_whitelist": ""}
    try:
        with av.open(BytesIO(data), metadata_errors="ignore", container_options=options) as container:
            num_frames, fps = _measure(container, place, limits)
            indices = sampled_frames(num_frames, fps, preprocessing.sample_fps)
            frames = _decode(container, indices, place, limits)
            return list(_chunks(frames, [index / fps for index in indices], preprocessing))
    except ImageError:
        raise
    except Exception as error:  # a broken file can make its decoder fail in any way
        reason = f"it is not a video file, or it is broken: {getattr(error, 'strerror', None) or error}"
        raise ImageError(place, reason, hint=SAVE_AGAIN_HINT) from error


def sampled_frames(num_frames: int, fps: float, sample_fps: float) -> list[int]:
    """Return the numbers of the frames that the model sees, from 0.

    Args:
        num_frames: number of frames of the video.
        fps: its frames per second.
        sample_fps: frames per second that the model sees.
    """
    num_sampled = max(1, round(num_frames * min(sample_fps, fps) / fps))
    return np.linspace(0, num_frames - 1, num_sampled).round().astype(int).tolist()


def format_time_stamp(seconds: float) -> str:
    """Return a time as `HH:MM:SS.mmm`; milliseconds are cut, not rounded."""
    whole = int(seconds)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}.{int(seconds % 1 * 1000):03}"


def _measure(container: Any, place: str, limits: MediaLimits) -> tuple[int, float]:
    """Return the number of frames and frames per second, without decoding; check them and the size of a frame.

    Frames are counted in the packets, since the number in the header may be missing or wrong.
    """
    if not container.streams.video:
        raise ImageError(place, "the file has no video stream", hint="send a file with one, or images")
    stream = container.streams.video[0]
    check_size((stream.width, stream.height), place, limits.max_frame_pixels, limits.max_side)
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    if fps <= 0:
        raise ImageError(place, "the number of frames per second is unknown", hint=SAVE_AGAIN_HINT)
    num_frames = 0
    for packet in container.demux(stream):
        num_frames += packet.size > 0
        if num_frames > min(limits.max_video_frames, limits.max_video_s * fps):
            raise ImageError(
                place,
                f"the video has more than {num_frames - 1:,} frames at {fps:.4g} per second; the limits are"
                f" {limits.max_video_frames:,} frames and {limits.max_video_s:.0f} s",
                hint="send a shorter part of it",
            )
    if not num_frames:
        raise ImageError(place, "the video has no frames", hint=SAVE_AGAIN_HINT)
    container.seek(0)
    return num_frames, fps


def _decode(container: Any, indices: Sequence[int], place: str, limits: MediaLimits) -> Iterator[Image.Image]:
    """Yield the frames with these numbers, upright, as RGB images; repeat the last one if frames are missing."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    num_missing = len(indices)
    image: Image.Image | None = None
    for number, frame in enumerate(container.decode(stream)):
        check_size((frame.width, frame.height), place, limits.max_frame_pixels, limits.max_side)
        if number == indices[-num_missing]:
            decoded: Image.Image = frame.to_image()
            image = decoded.rotate(frame.rotation, expand=True) if frame.rotation else decoded
            yield image
            num_missing -= 1
        if not num_missing:
            return
    if image is None:
        raise ImageError(place, "no frame of the video can be decoded", hint=SAVE_AGAIN_HINT)
    yield from [image] * num_missing


def _chunks(frames: Iterator[Image.Image], times: Sequence[float], settings: Preprocessing) -> Iterator[MediaChunk]:
    """Yield the frames in chunks, each with the time of its first frame. Each chunk is decoded when it is needed."""
    size = settings.temporal_merge_kernel_size
    for time in times[::size]:
        chunk = list(islice(frames, size))
        patches = to_patches(chunk, settings.in_patch_limit_each_frame, settings.patch_limit_on_one_side)
        yield MediaChunk(patches, format_time_stamp(time))
