"""Environment variables that huggingface_hub and its HTTP client read: find the broken one, and name it.

Sources: https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables and
https://www.python-httpx.org/environment_variables/. Only functions import huggingface_hub: that takes half a second,
and fails if a number is not one.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from kimi_mlx.errors import UsageError

NUMBERS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
"""Variables with the folder of the hub's cache; the first one that is set counts."""
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
NETWORK_VARIABLES = ("HF_ENDPOINT", *PROXY_VARIABLES, "NO_PROXY", "no_proxy")
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

URL_CHARACTERS = re.compile(r"[^!-~]|[\"'<>\\^`{|}]")
TOKEN_CHARACTERS = re.compile(r"[^!-~]|[\"'`<>]")
HEADER_CHARACTERS = re.compile(r"[^ -~]")
PATH_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\ufeff]|^[\"'\s\u2018-\u201d]|[\"'\s\u2018-\u201d]$")
"""Characters that a value must not contain: each is a mistake of typing or quoting."""

CHARACTER_NAMES = {"\n": "a newline", "\r": "a carriage return", "\t": "a tab", " ": "a space", "\ufeff": "a BOM"}


def constants() -> ModuleType:
    """Return `huggingface_hub.constants`.

    Raises:
        UsageError: a variable that must be a number is not one.
    """
    for variable in NUMBERS:
        value = os.environ.get(variable)
        try:
            is_valid = value is None or int(value) >= 0
        except ValueError:
            is_valid = False
        if not is_valid:
            raise UsageError(f"`{variable}` is `{value}`, not a number of seconds", hint=f"`unset {variable}`")
    from huggingface_hub import constants

    return constants


def hub_cache() -> Path:
    """Return the folder of the hub's cache.

    Raises:
        UsageError: the variable that sets it is empty, or contains quotes, control characters or an unknown variable.
    """
    folder = Path(constants().HF_HUB_CACHE).expanduser()
    variable = cache_variable()
    if variable is None:
        return folder
    value = os.environ[variable]
    expanded = os.path.expandvars(os.path.expanduser(value))
    if not value or expanded.startswith("~") or re.search(r"\$\w|\$\{", expanded):
        raise UsageError(f"`{variable}` is `{value}`, which is not a folder", hint=f"set {variable} to a folder")
    _check_characters(variable, value, PATH_CHARACTERS)
    return folder


def cache_variable() -> str | None:
    """Return the variable that sets the folder of the hub's cache; None for the default folder."""
    return next((name for name in CACHE_VARIABLES if name in os.environ), None)


def offline_variable() -> str:
    """Return the variable that forbids requests."""
    return next((name for name in OFFLINE_VARIABLES if os.environ.get(name)), OFFLINE_VARIABLES[0])


def hub_name() -> str:
    """Return the name of the hub for messages, with the variable if it is not Hugging Face's own."""
    return f"`{endpoint()}` (HF_ENDPOINT)" if "HF_ENDPOINT" in os.environ else "Hugging Face"


def endpoint() -> str:
    """Return the address of the hub, without a password."""
    return _hide_login(constants().ENDPOINT)


def _hide_login(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//", address)


def token_source() -> str | None:
    """Return the variable or file with the user's token; None without one."""
    for variable in TOKEN_VARIABLES:
        if os.environ.get(variable):
            return variable
    path = Path(constants().HF_TOKEN_PATH)
    return str(path) if path.exists() else None


def proxy_for_hub() -> tuple[str, str] | None:
    """Return the variable and the address (without password) of the proxy to the hub; None without a proxy."""
    url = urlsplit(constants().ENDPOINT)
    proxies = getproxies()
    scheme = next((name for name in (url.scheme, "all") if proxies.get(name)), None)
    if scheme is None or proxy_bypass(url.hostname or ""):
        return None
    return _proxy_variable(scheme, proxies[scheme]), _hide_login(proxies[scheme])


def check_settings() -> None:
    """Check the variables that apply to requests. Called after a request has failed, to find the reason.

    Raises:
        UsageError: a variable, or a file that it names, is broken.
    """
    _check_endpoint()
    _check_folders()
    check_token()
    _check_characters("HF_HUB_USER_AGENT_ORIGIN", os.environ.get("HF_HUB_USER_AGENT_ORIGIN", ""), HEADER_CHARACTERS)
    for scheme, address in getproxies().items():
        if scheme in ("http", "https", "all"):
            _check_proxy(_proxy_variable(scheme, address), address)
    _check_certificates()


def _check_characters(name: str, value: str, forbidden: re.Pattern[str]) -> None:
    """Refuse the value of a variable, or of a file, that contains a forbidden character."""
    if match := forbidden.search(value):
        character = match[0]
        shown = CHARACTER_NAMES.get(character) or (f"`{character}`" if character.isprintable() else "a character")
        code = "" if character.isascii() and character.isprintable() else f" (U+{ord(character):04X})"
        raise UsageError(
            f"`{name}` contains {shown}{code}, at position {match.start() + 1} of {len(value)}",
            hint=f"remove it from {name}",
        )


def _check_endpoint() -> None:
    value = os.environ.get("HF_ENDPOINT")
    if value is None:
        return
    _check_characters("HF_ENDPOINT", value, URL_CHARACTERS)
    if _is_address(value, ("http", "https")):
        return
    raise UsageError(
        f"`HF_ENDPOINT` is `{value}`, not an address such as `https://huggingface.co`", hint="`unset HF_ENDPOINT`"
    )


def _check_folders() -> None:
    for variable in ("HF_HOME", cache_variable()):
        if variable is None or variable not in os.environ:
            continue
        folder = Path(constants().HF_HOME if variable == "HF_HOME" else hub_cache())
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            message = f"`{variable}` is `{os.environ[variable]}`, but `{existing}` is a file"
            raise UsageError(message, hint=f"set {variable} to a folder")


def _is_address(value: str, schemes: Iterable[str]) -> bool:
    try:
        url = urlsplit(value)
        return url.scheme in schemes and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


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
    _check_characters(source, token.strip(), TOKEN_CHARACTERS)


def _check_proxy(variable: str, address: str) -> None:
    _check_characters(variable, address, URL_CHARACTERS)
    full_address = address if "://" in address else f"http://{address}"
    if not _is_address(full_address, ("http", "https", "socks5", "socks5h")):
        raise UsageError(
            f"`{variable}` is not the address of a proxy that can be used: `{_hide_login(address)}`",
            hint="write it as `http://HOST:PORT` or `socks5://HOST:PORT`; in a user name or password, write "
            "`@`, `:`, `/` and `#` as `%40`, `%3A`, `%2F` and `%23`",
        )


def _proxy_variable(scheme: str, address: str) -> str:
    """Return the variable that sets a proxy; on macOS it may come from the system's settings."""
    names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY")
    return next((name for name in names if os.environ.get(name) == address), "the system's proxy settings")


def _check_certificates() -> None:
    for variable, is_folder in (("SSL_CERT_FILE", False), ("SSL_CERT_DIR", True)):
        value = os.environ.get(variable)
        if not value:
            continue
        kind = "folder" if is_folder else "file"
        if not (os.path.isdir(value) if is_folder else os.path.isfile(value)):
            _check_characters(variable, value, PATH_CHARACTERS)
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
