"""The files of a model besides its weights: one list for downloads, stores, conversions and checks of the cache."""

from __future__ import annotations

import json
import re
from pathlib import Path

TEMPLATE_FOLDER = "additional_chat_templates"
"""Folder of further chat templates, one file each, as transformers names it."""

SMALL_FILE = re.compile(rf"[^/.][^/]*\.(json|jinja)|tiktoken\.model|{TEMPLATE_FOLDER}/[^/.][^/]*\.jinja")
WEIGHTS_FILE = re.compile(r"model[^/]*\.safetensors")
CACHED_FILE = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]{40}/")
"""Part of the path of a file in the Hugging Face cache, with the owner and the name of its repository."""

INDEX_SUFFIX = ".index.json"

REQUIRED = (("config.json",), ("tokenizer_config.json",), ("tiktoken.model", "tokenizer.json"))
"""Files without which a model cannot answer; one of each group is enough."""

OPTIONAL = (("generation_config.json",), ("chat_template.jinja", "chat_template.json"), ("tokenizer.json",))
"""Files that some repositories lack, and others need."""

KNOWN_NAMES = tuple(dict.fromkeys(name for group in (*REQUIRED, *OPTIONAL) for name in group))


def is_small_file(path: str) -> bool:
    """Return whether a file is copied unchanged: configuration, tokenizer, chat template. Never Python code.

    Args:
        path: path relative to the model's folder.
    """
    return SMALL_FILE.fullmatch(path) is not None and not path.endswith(INDEX_SUFFIX)


def is_model_file(path: str) -> bool:
    """Return whether a file is part of a model: weights, index, or a small file."""
    return WEIGHTS_FILE.fullmatch(path) is not None or SMALL_FILE.fullmatch(path) is not None


def list_small_files(folder: Path) -> list[str]:
    """Return the relative paths of the small files in a folder, sorted."""
    return [name for name in small_names(folder) if (folder / name).is_file()]


def small_names(folder: Path) -> list[str]:
    """Return the relative paths in a folder that have the names of small files, sorted, whatever is there."""
    paths = [*folder.iterdir(), *folder.glob(f"{TEMPLATE_FOLDER}/*")]
    return sorted(filter(is_small_file, (path.relative_to(folder).as_posix() for path in paths)))


def fetch_again_hint(path: Path | str) -> str:
    """Return the hint for a damaged file of a model, with the command if the file is in the Hugging Face cache."""
    match = CACHED_FILE.search(str(path))
    return "fetch the file again" if match is None else f"`kimi-mlx download {match[1]}/{match[2]}` fetches it again"


def missing_required(folder: Path) -> list[tuple[str, ...]]:
    """Return the groups of required files of which a folder has none."""
    return [group for group in REQUIRED if not _has_any(folder, group)]


def missing_optional(folder: Path) -> list[tuple[str, ...]]:
    """Return the groups of optional files that a folder may lack, depending on what its repository has."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        settings = {}
    has_template = "chat_template" in settings or any(folder.glob(f"{TEMPLATE_FOLDER}/*.jinja"))
    has_added_tokens = "added_tokens_decoder" in settings
    is_needed = {"chat_template.jinja": not has_template, "tokenizer.json": not has_added_tokens}
    return [group for group in OPTIONAL if is_needed.get(group[0], True) and not _has_any(folder, group)]


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)
