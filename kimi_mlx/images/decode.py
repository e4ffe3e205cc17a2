"""Decode image files that may be broken or malicious.

PIL opens only the formats listed here: it knows many more, some of which start other programs. Sizes are taken from the
header and checked before memory for the pixels is allocated.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import threading
import warnings
from collections.abc import Generator
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image

from kimi_mlx.errors import ImageError
from kimi_mlx.images.data_url import SMALLER_HINT, too_large
from kimi_mlx.images.limits import MediaLimits
from kimi_mlx.images.other_formats import AS_PNG, find_other_format
from kimi_mlx.install_command import install_command

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""PIL's names of the formats that it may open."""
HEIC_BRANDS = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"])
"""Brands of HEIC files. A brand follows `ftyp` at the beginning of a file."""
GREY_16_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
"""PIL's modes of grey images with 16 bits a pixel."""
REFUSED_MODES = {"I": "32-bit integers", "F": "32-bit floating-point numbers"}
"""PIL's modes whose range of values is unknown, so that they have no meaning as 8-bit pixels."""
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that brings an image upright, by the value of its EXIF tag `Orientation`."""
SAVE_AGAIN_HINT = "open it in a viewer and save it again"

_one_at_a_time = threading.Lock()
"""Limits memory to one image, and protects the filters of warnings, which all threads share."""


def decode_image(data: bytes, place: str, limits: MediaLimits) -> Image.Image:
    """Return an image file as an upright RGB image; of an animation, its first frame.

    Transparency is dropped as PIL's `convert("RGB")` does it, so the colours of transparent pixels show, and colour
    profiles are not applied. Both are as in the image processor that Moonshot publishes.

    Args:
        data: contents of the file.
        place: name or location of the image, for error messages.
        limits: limits of its bytes and pixels.

    Raises:
        ImageError: the file is too large, broken or of an unknown format.
    """
    if len(data) > limits.max_bytes:
        raise too_large(place, len(data), limits.max_bytes)
    formats = _formats_of(data, place)
    if size := _canvas_size(data):
        check_size(size, place, limits.max_pixels, limits.max_side)
    with _one_at_a_time, _without_warnings():
        try:
            image, transposition = _read_rgb(data, formats, place, limits)
            return image if transposition is None else image.transpose(transposition)
        except ImageError:
            raise
        except Exception as error:  # a broken file can make its decoder fail in any way
            raise _broken(data, place, error, limits) from error


def _read_rgb(
    data: bytes, formats: tuple[str, ...], place: str, limits: MediaLimits
) -> tuple[Image.Image, Image.Transpose | None]:
    """Return an image as RGB, and the transposition that brings it upright. The file's own pixels are freed."""
    with Image.open(BytesIO(data), formats=formats) as image:
        for size in (image.size, _tile_size(image)):
            check_size(size, place, limits.max_pixels, limits.max_side)
        image.load()
        return _to_rgb(image, place), _transposition(image)


def check_size(size: tuple[int, int], place: str, max_pixels: int, max_side: int) -> None:
    """Check the width and height of an image or of a video frame.

    Raises:
        ImageError: there are too many pixels, or none.
    """
    width, height = size
    if min(size) < 1:
        raise ImageError(place, f"it has {width} x {height} pixels", hint=SAVE_AGAIN_HINT)
    if width * height > max_pixels or max(size) > max_side:
        maxima = f"{max_pixels:,} in all and {max_side:,} per side"
        raise ImageError(place, f"it has {width} x {height} pixels; the limits are {maxima}", hint=SMALLER_HINT)


def _formats_of(data: bytes, place: str) -> tuple[str, ...]:
    """Return the formats that PIL may try; for a HEIC file, also its own, if the extra is installed."""
    if data[4:8] != b"ftyp" or data[8:12] not in HEIC_BRANDS:
        return FORMATS
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        hint = f"run `{install_command('pillow-heif')}`, or send JPEG or PNG"
        reason = "HEIC images need the package `pillow-heif`, which is not installed"
        raise ImageError(place, reason, hint=hint) from error
    return (*FORMATS, "HEIF")


def _canvas_size(data: bytes) -> tuple[int, int] | None:
    """Return the declared size of a WebP or GIF file, for which PIL allocates memory when it opens the file."""
    if data[:4] == b"GIF8":
        return int.from_bytes(data[6:8], "little") or 1, int.from_bytes(data[8:10], "little") or 1
    chunk = data[12:16] if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30 else b""
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF or 1, int.from_bytes(data[28:30], "little") & 0x3FFF or 1
    return None


def _tile_size(image: Image.Image) -> tuple[int, int]:
    """Return the size of a TIFF file's tiles, which its decoder allocates; (1, 1) for other files."""
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag) for tag in (322, 323))
    return (width, height) if isinstance(width, int) and isinstance(height, int) else (1, 1)


def _transposition(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that brings a loaded image upright. Cameras record how they were held, as metadata."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # metadata that cannot be read does not matter to the pixels
        return None
    return TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None


def _to_rgb(image: Image.Image, place: str) -> Image.Image:
    if image.mode in REFUSED_MODES:
        reason = f"its pixels are {REFUSED_MODES[image.mode]}, whose range is unknown"
        raise ImageError(place, reason, hint="convert the image to 8 bits per channel")
    if image.mode in GREY_16_MODES:  # PIL would clip the values at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # it changes no colour
    return image if image.mode == "RGB" else image.convert("RGB")


def _broken(data: bytes, place: str, error: Exception, limits: MediaLimits) -> ImageError:
    if isinstance(error, Image.DecompressionBombError):
        number = next(iter(re.findall(r"\d+", str(error))), "too many")
        return ImageError(place, f"it has {number} pixels; the limit is {limits.max_pixels:,}", hint=SMALLER_HINT)
    if isinstance(error, Image.UnidentifiedImageError):
        return _unidentified(data, place)
    reason = f"the file is broken: {error or type(error).__name__}"
    return ImageError(place, reason, hint=SAVE_AGAIN_HINT)


def _unidentified(data: bytes, place: str) -> ImageError:
    if not data:
        return ImageError(place, "the file is empty", hint="save it again")
    if (other := find_other_format(data)) is not None:
        return ImageError(place, f"it is {other.name}, which is not read as an image", hint=other.hint)
    reason = "it is not a PNG, JPEG, WebP, GIF, BMP, TIFF or HEIC file, or its header is broken"
    return ImageError(place, f"{reason}; it begins with {data[:12].hex(' ')}", hint=AS_PNG)


@contextlib.contextmanager
def _without_warnings() -> Generator[None, None, None]:
    """Ignore PIL's warnings, such as those about odd metadata: the user cannot act on them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _silence_libtiff() -> None:
    """Keep libtiff from writing a line to stderr for each error and warning, of which a file can have very many."""
    library = ctypes.CDLL(Image.core.__file__)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with contextlib.suppress(AttributeError):  # PIL without TIFF, or with symbols hidden
            set_handler = getattr(library, name)
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


_silence_libtiff()
