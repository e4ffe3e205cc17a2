"""Model names: aliases, folders and repositories. Resolving a name sends no requests."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from kimi_mlx.errors import UsageError
from kimi_mlx.folders import stores_folder
from kimi_mlx.hub.cache import repository_folder
from kimi_mlx.hub.catalogue import CatalogueEntry, DraftEntry, catalogue, draft_of, drafts, find_draft, find_entry
from kimi_mlx.store.store_folders import source_folder

AUTO = "auto"
"""Name of the known draft model of a model."""

SIMILAR_NAME_RATIO = 0.7
"""difflib's similarity from which an alias is suggested: `kimi-k25` suggests `kimi-k2.5`, `llama` suggests nothing."""


@dataclass(frozen=True)
class ModelRef:
    """A resolved model name: a folder or a repository.

    Args:
        name: name as the user typed it.
        folder: folder given by the user, or bundled with the package; None for a repository.
        repository: repository on the hub; None for a folder.
        entry: catalogue entry; None if not in the catalogue.
        draft: catalogue entry of a draft model; None for any other model.
    """

    name: str
    folder: Path | None
    repository: str | None
    entry: CatalogueEntry | None
    draft: DraftEntry | None = None

    @property
    def source(self) -> Path | str:
        """Folder, or else repository."""
        source = self.folder or self.repository
        assert source is not None
        return source

    @property
    def sampling(self) -> dict[str, float]:
        """Sampling parameters that the catalogue recommends, by name."""
        return self.entry.default_sampling() if self.entry else {}

    @property
    def instant_sampling(self) -> dict[str, float]:
        """Sampling parameters that the catalogue recommends for answers without thinking, by name."""
        instant = self.entry.instant_sampling if self.entry else None
        return instant.recommended() if instant else {}


def resolve_model_name(name: str) -> ModelRef:
    """Resolve the name of a model or draft model.

    Args:
        name: alias, folder, or repository `owner/name`.

    Raises:
        UsageError: unknown name (the message suggests similar ones), or an unsupported model.
    """
    for entry in catalogue():
        if name == entry.alias and entry.refused is None:
            return ModelRef(name, _check_packaged(name, entry.packaged_folder()), repository_of(entry), entry)
    for draft in drafts():
        if name == draft.alias:
            return ModelRef(name, _check_packaged(name, draft.packaged_folder()), draft.repository, None, draft)
    path = os.path.expanduser(name)
    if os.path.isdir(path):  # unlike Path.is_dir, returns False for invalid paths
        return ModelRef(name, Path(path), None, None)
    entry = find_entry(name)
    if entry is not None and entry.refused is None and name != entry.alias == name.lower():
        return resolve_model_name(entry.alias)
    for entry in catalogue():
        if entry.refused is not None and _has_version(name, entry):
            raise UsageError(
                f"`{name}` is a version of {entry.title}, which is not supported: {entry.refused}",
                hint="use a model of the K2 family: `kimi-mlx models` lists them",
            )
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/")):
        return _resolve_repository(name)
    raise unknown_model_error(name)


def _check_packaged(name: str, folder: Path | None) -> Path | None:
    """Return the folder of a bundled model after a check that it is there."""
    if folder is not None and not (folder / "config.json").is_file():
        raise UsageError(f"`{name}` is missing from this installation", hint="install kimi-mlx again")
    return folder


def resolve_draft_name(name: str, model: ModelRef) -> ModelRef:
    """Resolve the name of a draft model.

    Args:
        name: alias, folder or repository; `auto` for the known draft model of the model.
        model: the model for which it drafts.

    Raises:
        UsageError: unknown name, no known draft model, or a draft model that is known to be for another model.
    """
    if name == AUTO:
        draft = None if model.entry is None else draft_of(model.entry.alias)
        if draft is None:
            known = ", ".join(f"`{draft.model}`" for draft in drafts())
            raise UsageError(
                f"no draft model is known for `{model.name}`",
                hint=f"name one, as a folder or a repository, or leave `--draft` out; one is known for {known}",
            )
        return resolve_model_name(draft.alias)
    resolved = resolve_model_name(name)
    if resolved.entry is not None:
        own = draft_of(resolved.entry.alias)
        raise UsageError(
            f"`{name}` is a model, not a draft model",
            hint="leave `--draft` out" if own is None else f"its draft model is `{own.alias}`: `--draft {own.alias}`",
        )
    if resolved.draft is not None and model.entry is not None and resolved.draft.model != model.entry.alias:
        raise UsageError(
            f"`{name}` is the draft model of `{resolved.draft.model}`, not of `{model.name}`",
            hint="`--draft auto` takes the draft model of the model, if one is known",
        )
    return resolved


def repository_of(entry: CatalogueEntry) -> str | None:
    """Return the repository of an entry: the earlier one if only that is on this machine, complete or not."""
    earlier = entry.earlier_repository
    if earlier is None or entry.repository is None or not _is_here(earlier) or _is_here(entry.repository):
        return entry.repository
    return earlier


def _is_here(repository: str) -> bool:
    stores = stores_folder()
    is_stored = stores is not None and source_folder(stores, repository).is_dir()
    return is_stored or repository_folder(repository).is_dir()


def _resolve_repository(name: str) -> ModelRef:
    repository, mark, revision = name.partition("@")
    if mark:
        raise UsageError(
            f"`{name}`: a model name has no revision",
            hint=f"run `kimi-mlx download {repository} --revision {revision}`, then use the folder that it prints",
        )
    return ModelRef(name, None, name, find_entry(name), find_draft(name))


def unknown_model_error(name: str) -> UsageError:
    """Return the error for an unknown name, with suggestions."""
    if name.startswith((".", "/", "~")):
        return UsageError(f"there is no folder `{name}`", hint="check the path; `kimi-mlx models` lists known models")
    similar = similar_aliases(name)
    question = f"did you mean {' or '.join(f'`{alias}`' for alias in similar)}? " if similar else ""
    return UsageError(
        f"there is no model `{name}`",
        hint=f"{question}`kimi-mlx models` lists the known models; a folder or a repository `owner/name` works too",
    )


def similar_aliases(name: str) -> list[str]:
    """Return the aliases that a misspelled name may mean, the most similar first."""
    known = [*(entry.alias for entry in catalogue() if entry.refused is None), *(entry.alias for entry in drafts())]
    aliases = {re.sub(r"[^a-z0-9]", "", alias): alias for alias in known}
    typed = re.sub(r"[^a-z0-9]", "", name.lower())
    similar = difflib.get_close_matches(typed, aliases, n=3, cutoff=SIMILAR_NAME_RATIO)
    if not similar and len(typed) > 1:
        similar = [alias for alias in aliases if alias.endswith(typed)]  # `k2.5`, `thinking`
    return [aliases[alias] for alias in similar]


def _has_version(name: str, entry: CatalogueEntry) -> bool:
    """Return whether a name, such as `mlx-community/Kimi_K3_4bit`, contains the version of the entry's alias, `k3`."""
    version = entry.alias.split("-")[-1]
    return version in name.lower().replace("_", "-").split("/")[-1].split("-")
