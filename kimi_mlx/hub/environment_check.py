"""Find a broken environment variable, or a broken file that one names, and the wrong character in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from kimi_mlx.errors import UsageError
from kimi_mlx.hub.environment import (
    PATH_CHARACTERS,
    TOKEN_VARIABLES,
    cache_variable,
    check_characters,
    constants,
    hide_login,
    hub_cache,
    proxy_variable,
    token_source,
)

URL_CHARACTERS = re.compile(r"[^!-~]|[\"'<>\\^`{|}]")
TOKEN_CHARACTERS = re.compile(r"[^!-~]|[\"'`<>]")
HEADER_CHARACTERS = re.compile(r"[^ -~]")
"""Characters that a value must not contain: each is an error of typing or quoting."""


def check_settings() -> None:
    """Check the variables that apply to requests. Called after a request has failed, to find the reason.

    Raises:
        UsageError: a variable, or a file that it names, is broken.
    """
    _check_endpoint()
    _check_folders()
    check_token()
    check_characters("HF_HUB_USER_AGENT_ORIGIN", os.environ.get("HF_HUB_USER_AGENT_ORIGIN", ""), HEADER_CHARACTERS)
    for scheme, address in getproxies().items():
        if scheme in ("http", "https", "all"):
            _check_proxy(proxy_variable(scheme, address), address)
    _check_certificates()


def _check_endpoint() -> None:
    value = os.environ.get("HF_ENDPOINT")
    if value is None:
        return
    check_characters("HF_ENDPOINT", value, URL_CHARACTERS)
    if _is_address(value, ("http", "https")):
        return
    raise UsageError(
        f"`HF_ENDPOINT` is `{value}`, not an address such as `https://huggingface.co`", hint="`unset HF_ENDPOINT`"
    )


def _is_address(value: str, schemes: Iterable[str]) -> bool:
    try:
        url = urlsplit(value)
        return url.scheme in schemes and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def _check_folders() -> None:
    for variable in ("HF_HOME", cache_variable()):
        if variable is None or variable not in os.environ:
            continue
        folder = Path(constants().HF_HOME if variable == "HF_HOME" else hub_cache())
        existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
        if not existing.is_dir():
            message = f"`{variable}` is `{os.environ[variable]}`, but `{existing}` is a file"
            raise UsageError(message, hint=f"set {variable} to a folder")


def check_token() -> None:
    """Check the user's token, which is never shown.

    Raises:
        UsageError: it cannot be read, or it contains a character that no token has.
    """
    if constants().HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return
    from huggingface_hub import get_token

    if "HF_OIDC_RESOURCE" in os.environ:
        try:
            get_token()
        except Exception as error:  # OIDCError, or whatever its requests raise
            raise UsageError(
                f"cannot get a token for `HF_OIDC_RESOURCE`: {error}", hint="`unset HF_OIDC_RESOURCE`"
            ) from error
    source = token_source()
    if source is None:
        return
    try:
        token = os.environ[source] if source in TOKEN_VARIABLES else Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(
            f"the token's file `{source}` cannot be read: {reason}",
            hint="check the file (its path comes from HF_TOKEN_PATH or HF_HOME), or run `hf auth login`",
        ) from error
    check_characters(source, token.strip(), TOKEN_CHARACTERS)


def _check_proxy(variable: str, address: str) -> None:
    check_characters(variable, address, URL_CHARACTERS)
    full_address = address if "://" in address else f"http://{address}"
    if not _is_address(full_address, ("http", "https", "socks5", "socks5h")):
        raise UsageError(
            f"`{variable}` is not the address of a proxy that can be used: `{hide_login(address)}`",
            hint="write it as `http://HOST:PORT` or `socks5://HOST:PORT`; in a user name or password, write "
            "`@`, `:`, `/` and `#` as `%40`, `%3A`, `%2F` and `%23`",
        )


def _check_certificates() -> None:
    import ssl  # takes 10 ms, and nothing else at the start needs it

    for variable, is_folder in (("SSL_CERT_FILE", False), ("SSL_CERT_DIR", True)):
        value = os.environ.get(variable)
        if not value:
            continue
        kind = "folder" if is_folder else "file"
        if not (os.path.isdir(value) if is_folder else os.path.isfile(value)):
            check_characters(variable, value, PATH_CHARACTERS)
            raise UsageError(f"`{variable}` is `{value}`, but there is no such {kind}", hint=f"`unset {variable}`")
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(**{"capath" if is_folder else "cafile": value})
        except OSError as error:
            raise UsageError(
                f"`{variable}`: cannot read certificates from `{value}`: {error.strerror or error}",
                hint="it must contain certificates in PEM format (`-----BEGIN CERTIFICATE-----`)",
            ) from error
    path = os.environ.get("SSLKEYLOGFILE")
    if path:
        try:
            with open(path, "ab"):
                pass
        except OSError as error:
            raise UsageError(
                f"`SSLKEYLOGFILE` is `{path}`, which cannot be written: {error.strerror}", hint="`unset SSLKEYLOGFILE`"
            ) from error
