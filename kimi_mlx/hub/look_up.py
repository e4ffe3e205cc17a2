"""List the files of a repository, from the hub or from the cache."""

from __future__ import annotations

import threading

from kimi_mlx.errors import KimiMlxError, UnreachableError
from kimi_mlx.hub.environment import constants
from kimi_mlx.hub.error_messages import not_a_hub_error
from kimi_mlx.hub.repository import Repository, RepositoryFile
from kimi_mlx.hub.retries import LOG, MAX_LOOKUP_FAILURES, Retries, with_retries
from kimi_mlx.hub.snapshots import describe_local, find_local, local_repository, newest_complete
from kimi_mlx.model_files import is_model_file


def find_repository(name: str, revision: str | None = None) -> Repository:
    """Return the files of a repository from the hub; if that fails, those in the cache, if they are complete.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        WeightsError: look_up failed, and the cache does not have the complete repository.
    """
    snapshot = find_local(name, revision)
    try:
        return look_up(name, revision, max_wait_s=None if snapshot is None else 0)
    except KimiMlxError as error:
        if snapshot is None and revision is None and isinstance(error, UnreachableError):
            snapshot = newest_complete(name)
        if snapshot is None:
            raise
        reason = error.message.rpartition("cannot be downloaded: ")[2]
        LOG.warning("note: using the files of `%s` on this machine: %s", name, reason)
        return local_repository(snapshot, name)


def look_up(name: str, revision: str | None = None, max_wait_s: float | None = None) -> Repository:
    """Return the files of a repository.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit; None for the main branch.
        max_wait_s: longest wait for a hub that is busy; None for as long as a download waits.

    Raises:
        WeightsError: no such repository, or the hub refuses to show it.
        UnreachableError: the hub cannot be reached, or offline mode forbids requests.
        UsageError: an environment variable is broken.
    """
    timeout_s = constants().HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub import HfApi, utils

    utils.logging.set_verbosity_error()  # no log line per retry: our error message is enough
    api = HfApi(library_name="kimi-mlx")
    retries = Retries(name, threading.Event(), max_wait_s, MAX_LOOKUP_FAILURES)
    try:
        info = with_retries(
            lambda: api.model_info(name, revision=revision, files_metadata=True, timeout=timeout_s), retries
        )
    except (LookupError, TypeError) as error:  # raised by the client while it parses the response
        raise not_a_hub_error(name) from error
    except UnreachableError as error:
        reason = error.message.partition(": ")[2]
        message = f"`{name}` {describe_local(name, revision)}, and cannot be downloaded: {reason}"
        raise UnreachableError(message, error.hint) from error
    siblings = [sibling for sibling in info.siblings or [] if is_model_file(sibling.rfilename)]
    if info.sha is None or any(sibling.size is None for sibling in siblings):
        raise not_a_hub_error(name)
    files = [
        RepositoryFile(sibling.rfilename, sibling.lfs.size, sha256=sibling.lfs.sha256)
        if sibling.lfs
        else RepositoryFile(sibling.rfilename, sibling.size or 0, blob_id=sibling.blob_id)
        for sibling in siblings
    ]
    return Repository(name, info.sha, tuple(sorted(files, key=lambda file: file.name)), revision or "main")
