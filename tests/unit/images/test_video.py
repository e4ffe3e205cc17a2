"""Videos: which frames are seen, their chunks and time stamps, limits and broken files."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.errors import ImageError
from kimi_mlx.images.limits import MediaLimits
from kimi_mlx.images.video import format_time_stamp, prepare_video, sampled_frames
from tests.examples import examples

av = pytest.importorskip("av", reason="the extra `video` is not installed")


def video(num_frames: int, fps: int, size: tuple[int, int] = (56, 28), container: str = "mp4") -> bytes:
    """Return a video whose frame i has the grey value 40 + 4 i."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(num_frames):
            pixels = np.full((size[1], size[0], 3), 40 + 4 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "avi"])
def test_frames_chunks_and_time_stamps(container: str) -> None:
    chunks = prepare_video(video(50, 10, container=container), "x")
    assert [chunk.image.grid for chunk in chunks] == [(4, 2, 4), (4, 2, 4), (2, 2, 4)]
    assert [chunk.image.num_tokens for chunk in chunks] == [2, 2, 2]
    numbers = np.linspace(0, 49, 10).round()
    assert [chunk.time_stamp for chunk in chunks] == [f"00:00:0{numbers[at] / 10:.3f}" for at in (0, 4, 8)]
    greys = [frame.mean() for chunk in chunks for frame in np.split(chunk.image.patches, chunk.image.grid[0])]
    assert np.abs(greys - (40 + 4 * numbers)).max() < 7  # neighbours differ by 16 or more
    assert len({chunk.image.digest for chunk in chunks}) == 3


def test_a_slow_or_short_video_is_seen_whole() -> None:
    assert [chunk.image.grid[0] for chunk in prepare_video(video(6, 1), "x")] == [4, 2]
    assert [chunk.image.grid[0] for chunk in prepare_video(video(1, 25), "x")] == [1]


def test_a_frame_has_a_quarter_of_the_tokens_of_an_image() -> None:
    (chunk,) = prepare_video(video(2, 2, (1200, 1024)), "x")
    assert chunk.image.grid == (2, 60, 70)  # 4,200: the limit of 4,096 patches holds before padding
    assert chunk.image.size == (1200, 1024)


def test_rotation_is_applied() -> None:
    """Phones store portrait videos as landscape, with a matrix that turns them by 90 degrees clockwise."""
    buffer = io.BytesIO()
    pixels = np.zeros((28, 56, 3), np.uint8)
    pixels[:, :28] = 200  # the left half; turned clockwise, the upper half
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 56, 28, "yuv420p"
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")), *stream.encode()]:
            file.mux(packet)
    data = buffer.getvalue()
    track = data.index(b"tkhd")
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    assert upright in data[track:]
    (chunk,) = prepare_video(data[:track] + data[track:].replace(upright, turned, 1), "x")
    assert chunk.image.size == (28, 56)
    assert chunk.image.patches[:4].mean() > 150
    assert chunk.image.patches[4:].mean() < 50


@given(st.integers(1, 5000), st.sampled_from([0.5, 1, 2, 23.976, 25, 29.97, 60, 120]))
def test_sampled_frames(num_frames: int, fps: float) -> None:
    frames = sampled_frames(num_frames, fps, 2.0)
    assert len(frames) == max(1, round(num_frames * min(2, fps) / fps))
    assert frames == sorted(set(frames))
    assert frames[0] == 0
    assert frames[-1] == (num_frames - 1 if len(frames) > 1 else 0)


@given(st.integers(0, 86_399_999))
def test_time_stamps(milliseconds: int) -> None:
    seconds = (milliseconds + 0.5) / 1000
    time = datetime(2026, 1, 1) + timedelta(milliseconds=milliseconds)
    assert format_time_stamp(seconds) == f"{time:%H:%M:%S}.{milliseconds % 1000:03}"


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (MediaLimits(max_video_bytes=1000), "more than 1.0 kB"),
        (MediaLimits(max_video_s=4), "more than 40 frames at 10 per second; the limits are 20,000 frames and 4 s"),
        (MediaLimits(max_video_frames=30), "more than 30 frames at 10 per second; the limits are 30 frames and 120 s"),
        (MediaLimits(max_frame_pixels=1000), "it has 56 x 28 pixels"),
        (MediaLimits(max_side=50), "it has 56 x 28 pixels"),
    ],
)
def test_limits(limits: MediaLimits, reason: str) -> None:
    with pytest.raises(ImageError, match="`x`") as raised:
        prepare_video(video(50, 10), "x", limits)
    assert reason in raised.value.reason


AUDIO_ONLY = io.BytesIO()
with av.open(AUDIO_ONLY, "w", format="matroska") as _file:
    _stream = _file.add_stream("pcm_s16le", rate=8000, layout="mono")
    _frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
    _frame.sample_rate = 8000
    for _packet in _stream.encode(_frame):
        _file.mux(_packet)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a video file"),
        (b"\x89PNG\r\n\x1a\n", "not a video file"),
        (AUDIO_ONLY.getvalue(), "no video stream"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hosts\n#EXT-X-ENDLIST\n", "not a video file"),
        (b"ffconcat version 1.0\nfile /etc/hosts\n", "not a video file"),
        (video(5, 10)[:200], "not a video file"),
    ],
)
def test_broken_videos_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as raised:
        prepare_video(data, "clip.mp4")
    assert raised.value.place == "clip.mp4"
    assert reason in raised.value.reason


WHOLE = [video(12, 6), video(12, 6, container="matroska")]


@examples(60)
@given(st.sampled_from(WHOLE), st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)), max_size=8))
def test_any_bytes_are_a_video_or_an_image_error(data: bytes, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(data)
    for at, value in changes:
        changed[at % len(changed)] = value
    with contextlib.suppress(ImageError):
        prepare_video(bytes(changed), "x")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImageError, match="videos need the package `av`") as raised:
        prepare_video(WHOLE[0], "clip.mp4")
    assert "install av" in str(raised.value.hint)
