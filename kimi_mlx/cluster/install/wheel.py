"""Build a wheel of the running kimi-mlx from its metadata and its current files.

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
"""Folder of the package kimi_mlx."""

DATE = (1980, 1, 1, 0, 0, 0)
"""Date of all files, so that the same files give the same wheel; the earliest that a zip file can hold."""

TAG = "py3-none-any"

_WHEEL = f"Wheel-Version: 1.0\nGenerator: kimi-mlx\nRoot-Is-Purelib: true\nTag: {TAG}\n"


def build_wheel(folder: Path) -> Path:
    """Write the wheel of the running kimi-mlx; the same files give the same bytes.

    The dependencies come from the installed metadata: after a change of pyproject.toml, install kimi-mlx again.

    Args:
        folder: folder for the wheel.

    Raises:
        InstallError: kimi-mlx runs from a folder and is not installed.
    """
    try:
        own = distribution("kimi-mlx")
    except PackageNotFoundError as error:
        message = f"kimi-mlx runs from {PACKAGE}, but is not installed: it has no metadata"
        raise InstallError(message, hint="run `pip install -e .` in its folder") from error
    return pack_wheel(folder, "kimi_mlx", own.version, _package_files(), _info_files(own))


def pack_wheel(folder: Path, name: str, version: str, files: Mapping[str, bytes], info: Mapping[str, bytes]) -> Path:
    """Write a platform-independent wheel.

    Args:
        folder: folder for the wheel.
        name: name of the distribution, without hyphens.
        version: version of the distribution.
        files: path below `site-packages` -> content.
        info: path below the metadata folder -> content; must contain `METADATA`.
    """
    info_folder = f"{name}-{version}.dist-info"
    # Metadata comes last, as the specification recommends.
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
    """Return the files of the package, without bytecode and files of the Finder."""
    return {
        f"kimi_mlx/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store"
    }


def _info_files(own: Distribution) -> dict[str, bytes]:
    """Return the files of the installed metadata that belong in a wheel."""
    names = ["METADATA", "entry_points.txt", *(f"licenses/{name}" for name in own.metadata.get_all("License-File", []))]
    texts = {name: own.read_text(name) for name in names}
    return {name: text.encode() for name, text in texts.items() if text is not None}
