"""Error messages for the hub, the network and the disk, each with a hint."""

from __future__ import annotations

import errno
from json import JSONDecodeError
from pathlib import Path

from kimi_mlx.errors import WeightsError
from kimi_mlx.units import format_bytes

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
SPACE_HINT = "free some space and run the same command again to resume, or set HF_HOME to a folder on a larger disk"


def client_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that a request through huggingface_hub may raise."""
    from huggingface_hub.utils import httpx

    return httpx.HTTPError, httpx.InvalidURL, OSError, ValueError


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of an error; None if there was no response."""
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def hub_error(error: Exception, repository: str) -> WeightsError:
    """Convert a permanent one of `client_errors` to an error for the user.

    Args:
        error: the exception.
        repository: name of the repository.
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
            f"`{repository}` is not completely on this machine, and `HF_HUB_OFFLINE` forbids downloads",
            hint="`unset HF_HUB_OFFLINE` and try again",
        )
    if isinstance(error, GatedRepoError):
        return WeightsError(
            f"`{repository}` is gated: its terms must be accepted first",
            hint=f"accept the terms at https://huggingface.co/{repository}, then run `hf auth login`",
        )
    if status_of(error) == 401 and get_token():
        return WeightsError(
            f"Hugging Face rejected your token for `{repository}`",
            hint="run `hf auth login` with a valid token, or `unset HF_TOKEN`",
        )
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)) or status_of(error) == 401:
        return WeightsError(
            f"repository `{repository}` does not exist on Hugging Face, or it is private",
            hint="check the spelling, or run `hf auth login`; `kimi-mlx models` lists known models",
        )
    if isinstance(error, RevisionNotFoundError):
        return WeightsError(
            f"`{repository}` does not have this revision",
            hint=f"its branches and tags are at https://huggingface.co/{repository}/tree/main",
        )
    if isinstance(error, EntryNotFoundError):
        return WeightsError(
            f"cannot download `{repository}`: Hugging Face lists a file that it does not have",
            hint="try again: the repository may have changed in the meantime",
        )
    if isinstance(error, JSONDecodeError):
        return not_a_hub_error(repository)
    if status_of(error) == 403:
        return WeightsError(
            f"your token may not read `{repository}` (403)",
            hint="run `hf auth login` with a token that has read access",
        )
    return WeightsError(
        f"cannot download `{repository}`: {describe(error)}",
        hint="check the network, then run the same command again to resume",
    )


def not_a_hub_error(repository: str) -> WeightsError:
    """Return the error for a response that is not from a hub, such as the login page of a network."""
    from huggingface_hub import constants

    return WeightsError(
        f"`{constants.ENDPOINT}` did not answer like a Hugging Face server (request for `{repository}`)",
        hint="`unset HF_ENDPOINT`, check the proxy settings, and check whether the network requires a login",
    )


def describe(error: Exception) -> str:
    """Describe an error in one line, without long signed URLs."""
    from huggingface_hub.utils import httpx

    if (status := status_of(error)) is not None:
        return f"Hugging Face answered with status {status}"
    if isinstance(error, httpx.ConnectError):
        return f"cannot connect to Hugging Face ({_first_line(error)})"
    if isinstance(error, httpx.TimeoutException):
        return "Hugging Face did not answer in time"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def disk_error(error: OSError, path: Path, missing_bytes: int | None = None) -> WeightsError:
    """Convert a disk error.

    Args:
        error: the exception.
        path: path of the file being written.
        missing_bytes: number of bytes still missing, if known.
    """
    if error.errno in DISK_FULL_ERRNOS:
        more = "" if missing_bytes is None else f"; {format_bytes(missing_bytes)} are missing"
        return WeightsError(f"the disk is full: `{path}` cannot be written{more}", hint=SPACE_HINT)
    return WeightsError(
        f"`{path}` cannot be written: {error.strerror or error}",
        hint="check the folder's owner and permissions, or set HF_HOME to a folder of your own",
    )
