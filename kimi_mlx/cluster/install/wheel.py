"""A wheel of the kimi-mlx that runs here, to be installed elsewhere: its metadata, and its files as they are now.

Source: PEP 427, https://packaging.python.org/en/latest/specifications/binary-distribution-format/
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from kimi_mlx.errors import InstallError

PACKAGE = Path(__file__).parents[2]
"""The folder of kimi_mlx."""

DATE = (1980, 1, 1, 0, 0, 0)
"""Of all files, so that the same files make the same wheel; the first that a zip file can hold."""

TAG = "py3-none-any"

_WHEEL = f"Wheel-Version: 1.0\nGenerator: kimi-mlx\nRoot-Is-Purelib: true\nTag: {TAG}\n"


def build_wheel(folder: Path) -> Path:
    """Write the wheel of the running kimi-mlx; the same files give the same bytes.

    What it depends on is what its installation says: after a change of pyproject.toml, install it anew.

    Args:
        folder: where to, under the name that pip expects.

    Raises:
        InstallError: it runs from a folder, without having been installed in any way.
    """
    try:
        own = distribution("kimi-mlx")
    except PackageNotFoundError as error:
        message = f"kimi-mlx runs from {PACKAGE}, but is not installed: it has no metadata"
        raise InstallError(message, hint="`pip install -e .` in its folder") from error
    return pack_wheel(folder, "kimi_mlx", own.version, _package_files(), _info_files(own))


def pack_wheel(folder: Path, name: str, version: str, files: Mapping[str, bytes], info: Mapping[str, bytes]) -> Path:
    """Write a wheel of files for any system.

    Args:
        folder: where to.
        name: of the distribution, without hyphens.
        version: of the distribution.
        files: path below `site-packages` -> content.
        info: path below the folder of metadata -> content; `METADATA` at least.
    """
    info_folder = f"{name}-{version}.dist-info"
    # The metadata come last, as the specification recommends.
    contents = dict(sorted(files.items()))
    contents.update((f"{info_folder}/{path}", data) for path, data in sorted(info.items()))
    contents[f"{info_folder}/WHEEL"] = _WHEEL.encode()
    record = f"{info_folder}/RECORD"
    lines = [_record_line(path, data) for path, data in contents.items()]
    contents[record] = "".join([*lines, f"{record},,\n"]).encode()
    wheel = folder / f"{name}-{version}-{TAG}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in contents.items():
            entry = zipfile.ZipInfo(path, DATE)
            entry.create_system = 3  # Unix, whose permissions follow
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return wheel


def _record_line(path: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    field = f'"{path}"' if "," in path else path
    return f"{field},sha256={digest},{len(data)}\n"


def _package_files() -> dict[str, bytes]:
    """All files of the package but what Python and the Finder leave there."""
    return {
        f"kimi_mlx/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store"
    }


def _info_files(own: Distribution) -> dict[str, bytes]:
    """What the installed metadata have that belongs into a wheel."""
    names = ["METADATA", "entry_points.txt", *(f"licenses/{name}" for name in own.metadata.get_all("License-File", []))]
    texts = {name: own.read_text(name) for name in names}
    return {name: text.encode() for name, text in texts.items() if text is not None}
