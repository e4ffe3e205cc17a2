"""Find a broken environment variable, or a broken file that one names, and the wrong character in it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.request import getproxies

from kimi_mlx.errors import UsageError
from kimi_mlx.files import irregular_kind, read_regular_file
from kimi_mlx.hub.environment import (
    CACHE_VARIABLES,
    PATH_CHARACTERS,
    TOKEN_VARIABLES,
    URL_CHARACTERS,
    cache_variable,
    check_characters,
    check_endpoint,
    constants,
    hide_login,
    hub_cache,
    is_address,
    proxy_variable,
    token_source,
)

TOKEN_CHARACTERS = re.compile(r"[^!-~]|[\"'`<>]")
HEADER_CHARACTERS = re.compile(r"[^ -~]")
"""Characters that a value must not contain: each is an error of typing or quoting."""

MAX_TOKEN_LENGTH = 8000
"""Longest token: most servers refuse longer headers."""


def check_settings() -> None:
    """Check the variables that apply to requests. Called after a request has failed, to find the reason.

    Raises:
        UsageError: a variable, or a file that it names, is broken.
    """
    check_endpoint()
    check_folders()
    check_token()
    check_characters("HF_HUB_USER_AGENT_ORIGIN", os.environ.get("HF_HUB_USER_AGENT_ORIGIN", ""), HEADER_CHARACTERS)
    for scheme, address in getproxies().items():
        if scheme in ("http", "https", "all"):
            _check_proxy(proxy_variable(scheme, address), address)
    _check_certificates()


def check_folders() -> None:
    """Check that the folders of the cache are folders, or can be made.

    Raises:
        UsageError: a variable names something else, or a folder inside it.
    """
    for variable in ("HF_HOME", cache_variable()):
        if variable is None or variable not in os.environ:
            continue
        folder = Path(constants().HF_HOME if variable == "HF_HOME" else hub_cache())
        existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not existing.is_dir():
            kind = irregular_kind(existing) or "a file"
            message = f"`{variable}` is `{os.environ[variable]}`, but `{existing}` is {kind}"
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
        token = os.environ[source] if source in TOKEN_VARIABLES else read_regular_file(Path(source)).decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        variable = next((name for name in ("HF_TOKEN_PATH", *CACHE_VARIABLES[2:]) if name in os.environ), None)
        origin = "" if variable is None else f" (its path comes from {variable})"
        raise UsageError(
            f"the token's file `{source}` cannot be read: {reason}",
            hint=f"check the file{origin}, or run `hf auth login`",
        ) from error
    check_characters(source, token.strip(), TOKEN_CHARACTERS)
    if len(token.strip()) > MAX_TOKEN_LENGTH:
        raise UsageError(
            f"the token in `{source}` has {len(token.strip())} characters, more than {MAX_TOKEN_LENGTH}",
            hint="run `hf auth login` with a valid token",
        )


def _check_proxy(variable: str, address: str) -> None:
    check_characters(variable, address, URL_CHARACTERS)
    full_address = address if "://" in address else f"http://{address}"
    has_late_login = "@" in full_address.partition("://")[2].partition("/")[2]  # a `/` in the password
    if has_late_login or not is_address(full_address, ("http", "https", "socks5", "socks5h")):
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
