"""Send a checkpoint's configuration, tokenizer and chat template from rank 0 to a front that has no copy."""

from __future__ import annotations

import base64
import hashlib
import json
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

    The folder is named by the digest of the files.

    Raises:
        RingError: a file is not one of the expected small files.
    """
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    folder = (cache_folder() or Path(tempfile.gettempdir())) / "text" / digest
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not is_small_file(name):
            raise RingError(f"rank 0 sent a file with the unexpected name {name!r}")
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, base64.b64decode(content))
    return folder
