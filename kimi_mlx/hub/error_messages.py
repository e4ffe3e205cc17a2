"""Error messages for the hub, the network and the disk, each with a hint."""

from __future__ import annotations

import contextlib
import errno
import os
from json import JSONDecodeError
from pathlib import Path
from urllib.parse import urlsplit

from kimi_mlx.errors import UnreachableError, WeightsError
from kimi_mlx.hub.environment import (
    NETWORK_VARIABLES,
    cache_variable,
    constants,
    endpoint,
    hub_name,
    offline_variable,
    proxy_for,
    token_source,
)
from kimi_mlx.hub.environment_check import check_folders, check_settings, check_token
from kimi_mlx.units import format_bytes

PROXY_LOGIN_NEEDED = 407
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
SPACE_HINT = "free some space and run the same command again to resume, or set HF_HOME to a folder on a larger disk"


def client_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that a request through huggingface_hub may raise."""
    from huggingface_hub.errors import OIDCError
    from huggingface_hub.utils import httpx
    from socksio import SOCKSError

    return httpx.HTTPError, httpx.InvalidURL, OIDCError, SOCKSError, OSError, ValueError


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of an error; None if there was no response."""
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def hub_error(error: Exception, repository: str) -> WeightsError:
    """Convert a permanent one of `client_errors` to an error for the user.

    Args:
        error: the exception.
        repository: name of the repository.

    Raises:
        UsageError: an environment variable is broken, which explains the exception.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OfflineModeIsEnabled):
        variable = offline_variable()
        return UnreachableError(
            f"cannot download `{repository}`: `{variable}` forbids it", hint=f"`unset {variable}` and try again"
        )
    if isinstance(error, HFValidationError):
        return WeightsError(
            f"`{repository}` cannot be the name of a repository: {_first_line(error)}",
            hint="check the spelling; `kimi-mlx models` lists known models",
        )
    if isinstance(error, GatedRepoError):
        return WeightsError(
            f"`{repository}` is gated: its terms must be accepted first",
            hint=f"accept the terms at https://huggingface.co/{repository}, then run `hf auth login`",
        )
    if status_of(error) is None:
        check_settings()
    if isinstance(error, RevisionNotFoundError):
        return WeightsError(
            f"`{repository}` does not have this revision",
            hint=f"its branches and tags are at https://huggingface.co/{repository}/tree/main",
        )
    if isinstance(error, EntryNotFoundError):
        return WeightsError(
            f"cannot download `{repository}`: {hub_name()} lists a file that it does not have",
            hint="try again: the repository may have changed in the meantime",
        )
    if isinstance(error, RepositoryNotFoundError) or status_of(error) in (401, 403):
        return _access_error(error, repository)
    if isinstance(error, JSONDecodeError):
        return not_a_hub_error(repository)
    if is_certificate_error(error):
        return _certificate_error(error, repository)
    check_settings()  # a status such as 404 or 431 may come from a broken address or token too
    return WeightsError(f"cannot download `{repository}`: {describe(error)}", hint=_hint(error))


def _access_error(error: Exception, repository: str) -> WeightsError:
    """Return the error for a repository that the hub does not show: unknown, private, or refused to this token."""
    check_token()
    source = token_source()
    if status_of(error) == 401 and source is not None:
        remedy = f"`unset {source}`" if source.isupper() else "run `hf auth logout`"
        return WeightsError(
            f"{hub_name()} rejected your token for `{repository}`, which is from `{source}`",
            hint=f"run `hf auth login` with a valid token, or {remedy}",
        )
    if status_of(error) == 403:
        return WeightsError(
            f"your token may not read `{repository}` (403)"
            if source
            else f"{hub_name()} denies access to `{repository}` (403)",
            hint="run `hf auth login` with a token that has read access",
        )
    return WeightsError(
        f"repository `{repository}` does not exist on {hub_name()}, or it is private",
        hint="check the spelling, or run `hf auth login`; `kimi-mlx models` lists known models",
    )


def unreachable_error(error: Exception, repository: str, failures: int) -> UnreachableError:
    """Return the error for a transient exception that did not go away.

    Args:
        error: the last exception.
        repository: name of the repository.
        failures: number of failures in a row.
    """
    times = f", {failures} times in a row" if failures > 1 else ""
    return UnreachableError(f"cannot download `{repository}`: {describe(error)}{times}", hint=_hint(error))


def _hint(error: Exception) -> str:
    """Return the hint for an error without a more specific one; only a lost connection is blamed on the network."""
    from huggingface_hub.utils import httpx

    status, proxy = status_of(error), proxy_for(_address(error))
    is_login_needed = status == PROXY_LOGIN_NEEDED or (isinstance(error, httpx.ProxyError) and "407" in str(error))
    if is_login_needed and proxy is not None:
        return f"write user name and password into {proxy[0]}: `http://USER:PASSWORD@HOST:PORT`"
    if status is not None and (status >= 500 or status in (408, 429)):
        return "try again later; the same command resumes"
    if status is not None:
        return "check HF_ENDPOINT: is it the address of a hub?" if "HF_ENDPOINT" in os.environ else "report this"
    if isinstance(error, (httpx.TransportError, ConnectionError, EOFError)):
        through = "" if proxy is None else f" and the proxy `{proxy[1]}` of {proxy[0]}"
        return f"check the network{through}, then run the same command again to resume"
    variables = " and ".join(name for name in NETWORK_VARIABLES if name in os.environ)
    return f"check {variables}, then run the same command again" if variables else "run it again, and report this"


def is_certificate_error(error: Exception) -> bool:
    """Return whether the server's certificate was refused, or the server does not speak TLS."""
    return "[SSL:" in str(error) or "CERTIFICATE_VERIFY_FAILED" in str(error)


def _certificate_error(error: Exception, repository: str) -> WeightsError:
    return WeightsError(
        f"cannot download `{repository}`: no secure connection to {_server_name(error)}: {_first_line(error)}",
        hint=_certificate_hint(error),
    )


def _certificate_hint(error: Exception) -> str:
    """Return what to change: the address, the clock, the trusted certificates, or the server."""
    text, proxy = str(error), proxy_for(_address(error))
    if "CERTIFICATE_VERIFY_FAILED" not in text:
        if "_ALERT_" in text:  # an answer in TLS
            return "this server speaks TLS, but refuses this client: ask its operator"
        if proxy is not None and proxy[1].startswith("https:"):
            return f"most proxies need an address with `http://`: change {proxy[0]}, which is `{proxy[1]}`"
        if "HF_ENDPOINT" in os.environ:
            return "if this server does not use TLS, write `http://` in HF_ENDPOINT"
    if "not valid for" in text:
        where = "the address in HF_ENDPOINT" if "HF_ENDPOINT" in os.environ else "whether the network requires a login"
        return f"the certificate is of another server: check {where}"
    if "has expired" in text or "not yet valid" in text:
        return "check the clock of this machine; if it is right, the certificate of the server must be renewed"
    trusted = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
    if trusted:
        names = " and ".join(f"{name} (`{os.environ[name]}`)" for name in trusted)
        return f"{names} must contain the certificate of the authority that signed that of the server"
    if unread := next((name for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if name in os.environ), None):
        return f"{unread} is not used here: set SSL_CERT_FILE to the same file"
    return "if your network inspects TLS, set SSL_CERT_FILE to its certificate (PEM); if not, check the clock"


def not_a_hub_error(repository: str, reason: str = "") -> WeightsError:
    """Return the error for responses that are not from a hub, such as the login page of a network.

    Args:
        repository: name of the repository.
        reason: description of the last response.
    """
    proxy = proxy_for(constants().ENDPOINT)
    parts = ["`unset HF_ENDPOINT`"] if "HF_ENDPOINT" in os.environ else []
    parts += ["check the proxy settings" if proxy is None else f"check the proxy of {proxy[0]}, `{proxy[1]}`"]
    return WeightsError(
        f"`{endpoint()}` did not answer like a Hugging Face server (request for `{repository}`)"
        + (f": {reason}" if reason else ""),
        hint=", ".join([*parts, "and check whether the network requires a login"]),
    )


def _address(error: Exception) -> str:
    """Return the address of the server of a failed request; after a redirect, that of the hub's storage."""
    from huggingface_hub.utils import httpx

    if isinstance(error, httpx.RequestError):
        with contextlib.suppress(RuntimeError):  # raised without a request
            url = error.request.url
            return f"{url.scheme}://{url.netloc.decode()}"
    return constants().ENDPOINT


def _server_name(error: Exception) -> str:
    """Return the name of the server of a failed request, for messages."""
    address = _address(error)
    if urlsplit(address).hostname == urlsplit(constants().ENDPOINT).hostname:
        return hub_name()
    return f"`{address}`, the storage of {hub_name()}"


def describe(error: Exception) -> str:
    """Describe an error in one line, without long signed URLs."""
    from huggingface_hub.utils import httpx
    from socksio import SOCKSError

    status, proxy = status_of(error), proxy_for(_address(error))
    if status == PROXY_LOGIN_NEEDED and proxy is not None:
        return f"the proxy `{proxy[1]}` of {proxy[0]} requires a login (407)"
    if status is not None:
        return f"{hub_name()} answered with status {status}"
    through = "" if proxy is None else f" through the proxy `{proxy[1]}` of {proxy[0]}"
    if isinstance(error, SOCKSError):
        return f"the proxy `{proxy[1]}` of {proxy[0]} does not speak SOCKS5" if proxy else _first_line(error)
    if isinstance(error, (httpx.ConnectError, httpx.ProxyError)):
        return f"cannot connect to {_server_name(error)}{through} ({_first_line(error)})"
    if isinstance(error, httpx.TimeoutException):
        return f"{_server_name(error)} did not answer in time{through}"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def disk_error(error: OSError, path: Path, missing_bytes: int | None = None) -> WeightsError:
    """Convert a disk error.

    Args:
        error: the exception.
        path: path of the file being written.
        missing_bytes: number of bytes still missing, if known.

    Raises:
        UsageError: an environment variable names a folder that cannot be one.
    """
    if error.errno in DISK_FULL_ERRNOS:
        more = "" if missing_bytes is None else f"; {format_bytes(missing_bytes)} are missing"
        return WeightsError(f"the disk is full: `{path}` cannot be written{more}", hint=SPACE_HINT)
    check_folders()
    variable = cache_variable() or "HF_HOME"
    return WeightsError(
        f"`{path}` cannot be written: {error.strerror or error}",
        hint=f"check the folder's owner and permissions, or set {variable} to a folder of your own",
    )
