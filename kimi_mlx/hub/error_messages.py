"""What goes wrong between the hub, the network and the disk, in our words; each with what to type next."""

from __future__ import annotations

import errno
from json import JSONDecodeError
from pathlib import Path

from kimi_mlx.errors import WeightsError
from kimi_mlx.units import format_bytes

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
SPACE_HINT = "free some space and try again, or set HF_HOME to a folder on a larger disk; what was fetched is kept"


def client_errors() -> tuple[type[Exception], ...]:
    """All that a request through huggingface_hub may raise: its transport's errors, its own, broken JSON."""
    from huggingface_hub.utils import httpx

    return httpx.HTTPError, httpx.InvalidURL, OSError, ValueError


def status_of(error: Exception) -> int | None:
    """The HTTP status that the error stands for, None if there was no answer."""
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def hub_error(error: Exception, repository: str) -> WeightsError:
    """An error of `client_errors` that trying again does not mend, for the user.

    Args:
        error: what was raised.
        repository: its name.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return WeightsError(
            f"`{repository}` is not on this machine as a whole, and `HF_HUB_OFFLINE` keeps us from the hub",
            hint="`unset HF_HUB_OFFLINE` and try again",
        )
    if isinstance(error, GatedRepoError):
        return WeightsError(
            f"`{repository}` asks for your consent on the hub",
            hint=f"accept its terms at https://huggingface.co/{repository}, then `hf auth login`",
        )
    if status_of(error) == 401 and get_token():
        return WeightsError(
            f"the hub refuses your token, asked for `{repository}`",
            hint="`hf auth login` with a valid token, or `unset HF_TOKEN`",
        )
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)) or status_of(error) == 401:
        return WeightsError(
            f"there is no repository `{repository}` on the hub, or it is private",
            hint="check the spelling, or `hf auth login`; `kimi-mlx models` lists known models",
        )
    if isinstance(error, RevisionNotFoundError):
        return WeightsError(
            f"`{repository}` has no such revision on the hub",
            hint=f"its branches and tags are at https://huggingface.co/{repository}/tree/main",
        )
    if isinstance(error, EntryNotFoundError):
        return WeightsError(
            f"`{repository}` cannot be fetched: the hub lists a file that it does not have",
            hint="try again: the repository may just be changing",
        )
    if isinstance(error, JSONDecodeError):
        return not_a_hub_error(repository)
    if status_of(error) == 403:
        return WeightsError(
            f"the hub does not let you read `{repository}` (403)",
            hint="`hf auth login` with a token that may read it",
        )
    return WeightsError(
        f"`{repository}` cannot be fetched: {describe(error)}",
        hint="check the network and try again; what has been fetched so far is kept",
    )


def not_a_hub_error(repository: str) -> WeightsError:
    """What came is no answer of a hub: a log-in page of the network, or a server that is something else."""
    from huggingface_hub import constants

    return WeightsError(
        f"`{constants.ENDPOINT}` answers something else than a hub does, asked for `{repository}`",
        hint="`unset HF_ENDPOINT`, check proxies, and whether the network wants a log-in",
    )


def describe(error: Exception) -> str:
    """The error in a line; no signed addresses, which fill a screen."""
    from huggingface_hub.utils import httpx

    if (status := status_of(error)) is not None:
        return f"the hub answers {status}"
    if isinstance(error, httpx.ConnectError):
        return f"no connection to the hub ({_first_line(error)})"
    if isinstance(error, httpx.TimeoutException):
        return "the hub does not answer in time"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def disk_error(error: OSError, path: Path, missing_bytes: int | None = None) -> WeightsError:
    """An error of the disk, for the user.

    Args:
        error: what was raised.
        path: what was to be written.
        missing_bytes: how much of it is still to come, if that is known.
    """
    if error.errno in DISK_FULL_ERRNOS:
        more = "" if missing_bytes is None else f", {format_bytes(missing_bytes)} before its end"
        return WeightsError(f"the disk is full: `{path}` cannot be written{more}", hint=SPACE_HINT)
    return WeightsError(
        f"`{path}` cannot be written: {error.strerror or error}",
        hint="check the folder's owner and permissions, or set HF_HOME to a folder of your own",
    )
