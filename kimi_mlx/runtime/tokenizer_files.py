"""Send a checkpoint's configuration, tokenizer and chat template from rank 0 to a front that has no copy."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kimi_mlx.errors import RingError
from kimi_mlx.files import write_atomically
from kimi_mlx.folders import cache_folder
from kimi_mlx.model_files import is_small_file, list_small_files


def pack_tokenizer_files(folder: Path) -> dict[str, str]:
    """Return the small files of a checkpoint: their names and their contents in base64."""
    return {name: base64.b64encode((folder / name).read_bytes()).decode() for name in list_small_files(folder)}


def unpack_tokenizer_files(files: Mapping[str, str]) -> Path:
    """Write files from `pack_tokenizer_files` to a folder in the user's cache; return the folder.

    The folder is named by the digest of the files. If the cache cannot be written, it is in a temporary folder.

    Raises:
        RingError: a file is not one of the expected small files, or no folder can be written.
    """
    for name in files:
        if not is_small_file(name):
            raise RingError(f"rank 0 sent a file with the unexpected name {name!r}")
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    caches = cache_folder()
    if caches is not None:
        with contextlib.suppress(OSError):
            return _write(caches / "text" / digest, files)
    try:
        return _write(_temporary_folder() / "text" / digest, files)
    except OSError as error:
        raise RingError(
            f"the model's tokenizer cannot be written on this machine: {error.strerror} ({error.filename or 'TMPDIR'})",
            hint="free some space, or set XDG_CACHE_HOME or TMPDIR to a folder of your own",
        ) from error


def _write(folder: Path, files: Mapping[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, base64.b64decode(content))
    return folder


def _temporary_folder() -> Path:
    """Return this user's folder in the folder for temporary files. All runs share it, and none removes it.

    Raises:
        OSError: it cannot be created, or other users may write to it.
    """
    folder = Path(tempfile.gettempdir()) / f"kimi-mlx-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if state.st_uid != os.getuid() or not stat.S_ISDIR(state.st_mode) or state.st_mode & 0o022:
        raise PermissionError(errno.EACCES, "Other users may write to it", str(folder))
    return folder
