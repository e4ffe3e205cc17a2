"""Files that are broken, or made to use up memory or time: always a clear error, never anything else."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kimi_mlx.errors import ImageError
from kimi_mlx.images.limits import MediaLimits
from kimi_mlx.images.prepare import prepare_image
from tests.examples import examples

ROOT = Path(__file__).resolve().parents[3]
BITS = Image.effect_noise((77, 51), 60)
PICTURE = Image.merge("RGB", [BITS, BITS.rotate(180), BITS])
SIDES = (77, 51)


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, chunks: bytes = b"", rows: bytes = bytes(310)) -> bytes:
    """Return a PNG file with any declared size, additional chunks and rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(width: int, height: int, *tags: tuple[int, int, int, int]) -> bytes:
    """Return a grey TIFF file with any declared size and additional tags: number, type, count, value."""
    usual = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    strips = [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 100)]
    entries = sorted([*usual, *strips, *tags])
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 108) + bytes(100) + directory + bytes(4)


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


def with_app1(jpeg: bytes, body: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


LARGE = 30_000
JPEG, GIF, BMP, WEBP = (file_of(PICTURE, kind) for kind in ("JPEG", "GIF", "BMP", "WEBP"))
LOSSLESS = file_of(PICTURE, "WEBP", lossless=True)
ANIMATED = file_of(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(90)] * 3)
LARGE_HEADERS = {
    "png": png(LARGE, LARGE),
    "png within PIL's limit": png(10_000, 10_000),
    "png, one row": png(100_001, 1),
    "jpeg": replaced(JPEG, struct.pack(">HH", *SIDES[::-1]), struct.pack(">HH", LARGE, LARGE)),
    "gif": replaced(GIF, struct.pack("<HH", *SIDES), struct.pack("<HH", LARGE, LARGE)),
    "gif, only a frame": GIF[:13] + replaced(GIF[13:], struct.pack("<HH", *SIDES), struct.pack("<HH", 13_000, 13_000)),
    "bmp": replaced(BMP, struct.pack("<ii", *SIDES), struct.pack("<ii", LARGE, LARGE)),
    "webp": replaced(WEBP, struct.pack("<HH", *SIDES), struct.pack("<HH", 0x3FFF, 0x3FFF)),
    "webp, lossless": LOSSLESS[:21] + struct.pack("<I", 0x3FFF | 0x3FFF << 14) + LOSSLESS[25:],
    "webp, animated": ANIMATED[:24] + struct.pack("<I", LARGE)[:3] * 2 + ANIMATED[30:],
    "tiff": tiff(LARGE, LARGE),
    "tiff, tiles": tiff(10, 10, (322, 4, 1, LARGE), (323, 4, 1, LARGE), (324, 4, 1, 8), (325, 4, 1, 100)),
}
ZEROS = zlib.compress(bytes(50_000_000), 9)
BROKEN = {
    "empty": b"",
    "zeros": bytes(1000),
    "text": b"Hello",
    "pdf": b"%PDF-1.7\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "no pixels": png(0, 10),
    "png without rows": png(30, 30),
    "gif without frames": GIF[:13] + b";",
    "compressed text": png(10, 10, chunk(b"zTXt", b"k\0\0" + ZEROS)),
    "international text": png(10, 10, chunk(b"iTXt", b"k\0\1\0\0\0" + ZEROS)),
    "colour profile": png(10, 10, chunk(b"iCCP", b"k\0\0" + ZEROS)),
    "32-bit floats": file_of(BITS.convert("F"), "TIFF"),
    "32-bit integers": file_of(BITS.convert("I"), "TIFF"),
    "tiff strips beyond the end": tiff(10, 10_000),
    **LARGE_HEADERS,
}
IFD_LOOP = struct.pack("<HHHII", 1, 0x8769, 4, 1, 8)
ODD_BUT_READABLE = {
    "1 x 100,000": png(1, 100_000, rows=bytes(400_000)),
    "rows beyond the end": png(10, 10, rows=bytes(50_000_000)),
    "exif that contains itself": with_app1(JPEG, b"Exif\0\0II*\0\x08\0\0\0" + IFD_LOOP + struct.pack("<I", 8)),
    "exif of noise": with_app1(JPEG, b"Exif\0\0" + b"\xff" * 60),
    "exif cut off": with_app1(JPEG, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
    "png exif of noise": png(10, 10, chunk(b"eXIf", b"II*\0\x08\0\0\0" + b"\xff" * 9)),
    "tiff directory that contains itself": tiff(10, 10)[:-4] + struct.pack("<I", 108),
    "tiff exif that contains itself": tiff(10, 10, (34665, 4, 1, 108)),
    "tiff tag of 8 GB": tiff(10, 10, (338, 3, 0x7FFFFFFF, 8)),
    "much text": png(10, 10, chunk(b"tEXt", b"k\0" + b"a" * 900_000) * 10),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_files_are_refused(name: str) -> None:
    with pytest.raises(ImageError) as raised:
        prepare_image(BROKEN[name], "picture 3")
    assert raised.value.message.startswith("`picture 3`: ")
    assert raised.value.hint


@pytest.mark.parametrize("name", sorted(LARGE_HEADERS))
def test_large_sizes_name_both_numbers(name: str) -> None:
    with pytest.raises(ImageError, match=r"it has \d+( x \d+)? pixels; the limits? (are|is) 80,000,000"):
        prepare_image(LARGE_HEADERS[name], "x")


@pytest.mark.parametrize("name", sorted(ODD_BUT_READABLE))
def test_odd_metadata_does_not_matter(name: str) -> None:
    assert prepare_image(ODD_BUT_READABLE[name], "x").num_tokens > 0


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_image_may_have_300_frames(kind: str) -> None:
    frames = [BITS, BITS.rotate(180)] * 150
    assert prepare_image(file_of(BITS, kind, save_all=True, append_images=frames), "x").num_tokens > 0


def test_a_tag_longer_than_the_file_is_read_or_refused() -> None:
    with contextlib.suppress(ImageError):  # depends on the version of PIL
        assert prepare_image(tiff(10, 10, (270, 2, 0xFFFFFFF0, 8)), "x").num_tokens == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = file_of(PICTURE, kind)
    spare = 60 if kind in ("PNG", "GIF", "JPEG", "TIFF") else 3  # trailers, which decoders do not need
    for length in {*range(80), *range(80, len(data) - spare, max(1, len(data) // 60))}:
        with pytest.raises(ImageError):
            prepare_image(data[:length], "x")


def test_large_headers_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    """Run in a process of its own: only there the peak of memory is that of the files."""
    (tmp_path / "files").write_bytes(pickle.dumps([JPEG, WEBP, *LARGE_HEADERS.values()]))
    code = (
        "import pathlib, pickle, resource, sys, time\n"
        "from kimi_mlx.errors import ImageError\n"
        "from kimi_mlx.images.prepare import prepare_image\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for data in pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()):\n"
        "    before, start = peak(), time.process_time()\n"
        "    try: prepare_image(data, 'x')\n"
        "    except ImageError: print(peak() - before, time.process_time() - start)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "files"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    figures = [line.split() for line in result.stdout.splitlines()]
    assert len(figures) == len(LARGE_HEADERS), result.stderr
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    assert max(int(growth) * unit for growth, _ in figures) < 20_000_000
    assert max(float(seconds) for _, seconds in figures) < 0.1


def test_limits_of_bytes() -> None:
    with pytest.raises(ImageError, match=r"the file has 11.9 kB, more than 1.0 kB"):
        prepare_image(BMP, "x", MediaLimits(max_bytes=1000))


FILES = [file_of(PICTURE, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")] + [LOSSLESS, ANIMATED]


CHANGES = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8)


@examples(100)
@given(st.sampled_from(FILES), CHANGES, st.integers(0, 12_000))
def test_any_bytes_are_an_image_or_an_image_error(data: bytes, changes: list[tuple[int, int]], end: int) -> None:
    changed = bytearray(data)
    for at, value in changes:
        changed[at % len(changed)] = value
    with contextlib.suppress(ImageError):
        prepare_image(bytes(changed[:end]), "x")


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_an_image_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        prepare_image(data, "x")


def test_errors_in_several_threads() -> None:
    results: list[str] = []

    def run(data: bytes) -> None:
        try:
            results.append(prepare_image(data, "x").digest)
        except ImageError:
            results.append("refused")

    threads = [threading.Thread(target=run, args=(data,)) for data in [JPEG, BROKEN["zeros"], WEBP, b"", GIF] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results).count("refused") == 8
    assert len(set(results)) == 4


def test_a_broken_tiff_file_writes_nothing_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.frombytes("1", (64, 480), bytes(range(256)) * 15).save(file, "TIFF", compression="group4")
    data = bytearray(file.getvalue())
    data[200:2000:3] = bytes(byte ^ 0x55 for byte in data[200:2000:3])
    with contextlib.suppress(ImageError):
        prepare_image(bytes(data), "image")
    assert capfd.readouterr() == ("", "")
