"""Environment variables that huggingface_hub and its HTTP client read.

Sources: https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables and
https://www.python-httpx.org/environment_variables/. Only functions import huggingface_hub: the import takes half a
second, and fails if a numeric variable is not a number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from kimi_mlx.errors import UsageError

NUMBERS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
MAX_TIMEOUT_S = 10**6
CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
"""Variables with the folder of the hub's cache; the first one that is set takes precedence."""
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
NETWORK_VARIABLES = ("HF_ENDPOINT", *PROXY_VARIABLES, "NO_PROXY", "no_proxy")
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

URL_CHARACTERS = re.compile(r"[^!-~]|[\"'<>\\^`{|}]")
"""Characters that an address must not contain: each is an error of typing or quoting."""

PATH_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\ufeff]|^[\"'\s\u2018-\u201d]|[\"'\s\u2018-\u201d]$")
"""Characters that the name of a folder or file must not contain: each is an error of typing or quoting."""

CHARACTER_NAMES = {"\n": "a newline", "\r": "a carriage return", "\t": "a tab", " ": "a space", "\ufeff": "a BOM"}


def constants() -> ModuleType:
    """Return `huggingface_hub.constants`.

    Raises:
        UsageError: a variable that must be a number is not one, or huggingface_hub cannot parse HF_ENDPOINT.
    """
    for variable in NUMBERS:
        value = os.environ.get(variable)
        try:
            is_valid = value is None or 0 <= int(value) <= MAX_TIMEOUT_S
        except ValueError:
            is_valid = False
        if not is_valid:
            raise UsageError(f"`{variable}` is `{value}`, not a number of seconds", hint=f"`unset {variable}`")
    try:
        _ = urlsplit(os.environ.get("HF_ENDPOINT", "")).port
    except ValueError:  # the import would fail
        check_endpoint()
    from huggingface_hub import constants

    return constants


def check_endpoint() -> None:
    """Check HF_ENDPOINT.

    Raises:
        UsageError: it is not the address of a server.
    """
    value = os.environ.get("HF_ENDPOINT")
    if value is None:
        return
    check_characters("HF_ENDPOINT", value, URL_CHARACTERS)
    if not is_address(value, ("http", "https")):
        raise UsageError(
            f"`HF_ENDPOINT` is `{hide_login(value)}`, not an address such as `https://huggingface.co`",
            hint="`unset HF_ENDPOINT`",
        )


def is_address(value: str, schemes: Iterable[str]) -> bool:
    """Return whether a text is the address of a server, without a query or a fragment."""
    try:
        url = urlsplit(value)
        host = (url.hostname or "").encode("idna")  # a ValueError for empty or long parts
        is_plain = url.netloc.count("@") <= 1 and not {"?", "#"} & set(value)
        return url.scheme in schemes and bool(host) and url.port != 0 and is_plain
    except ValueError:
        return False


def hub_cache() -> Path:
    """Return the folder of the hub's cache.

    Raises:
        UsageError: the variable that sets it is empty, or contains quotes, control characters or an unknown variable.
    """
    folder = constants().HF_HUB_CACHE
    variable = cache_variable()
    if variable is not None:
        check_folder_variable(variable)
    return Path(folder).expanduser()


def check_folder_variable(variable: str) -> None:
    """Check the value of a variable that names a folder.

    Raises:
        UsageError: it is empty, or contains quotes, control characters or an unknown variable.
    """
    value = os.environ[variable]
    expanded = os.path.expandvars(os.path.expanduser(value))
    if not value or expanded.startswith("~") or re.search(r"\$\w|\$\{", expanded):
        raise UsageError(f"`{variable}` is `{value}`, which is not a folder", hint=f"set {variable} to a folder")
    check_characters(variable, value, PATH_CHARACTERS)


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
    return hide_login(constants().ENDPOINT)


def hide_login(address: str) -> str:
    """Return an address without user name and password, which may contain any character."""
    return re.sub(r"^((?:[^/@]*//)?).*@", r"\1", address, flags=re.DOTALL)


def token_source() -> str | None:
    """Return the variable or file with the user's token; None without one. The file may be unreadable."""
    for variable in TOKEN_VARIABLES:
        if os.environ.get(variable, "").strip():
            return variable
    path = constants().HF_TOKEN_PATH
    try:
        os.stat(path)
    except FileNotFoundError:
        return None
    except OSError:  # a loop of links, or a file in place of the folder: a request would fail too
        return path
    return path


def proxy_for(address: str) -> tuple[str, str] | None:
    """Return the variable and the address (without password) of the proxy to a server; None without a proxy."""
    url = urlsplit(address)
    proxies = getproxies()
    scheme = next((name for name in (url.scheme, "all") if proxies.get(name)), None)
    if scheme is None or proxy_bypass(url.hostname or ""):
        return None
    return proxy_variable(scheme, proxies[scheme]), hide_login(proxies[scheme])


def proxy_variable(scheme: str, address: str) -> str:
    """Return the variable that sets a proxy; on macOS it may come from the system's settings."""
    names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY")
    return next((name for name in names if os.environ.get(name) == address), "the system's proxy settings")


def check_characters(name: str, value: str, forbidden: re.Pattern[str]) -> None:
    """Refuse the value of a variable, or of a file, that contains a forbidden character."""
    if match := forbidden.search(value):
        character = match[0]
        shown = CHARACTER_NAMES.get(character) or (f"`{character}`" if character.isprintable() else "a character")
        code = "" if character.isascii() and character.isprintable() else f" (U+{ord(character):04X})"
        raise UsageError(
            f"`{name}` contains {shown}{code}, at position {match.start() + 1} of {len(value)}",
            hint=f"remove it from {name}",
        )
