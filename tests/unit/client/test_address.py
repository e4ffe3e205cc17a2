"""Addresses of servers as users type them."""

from __future__ import annotations

import httpx2
import pytest

from kimi_mlx.client.address import parse_address
from kimi_mlx.client.http import HttpClient
from kimi_mlx.errors import UsageError


@pytest.mark.parametrize(
    ("text", "url", "base"),
    [
        ("http://mac-a:8080", "http://mac-a:8080", "http://mac-a:8080/v1"),
        ("http://mac-a:8080/", "http://mac-a:8080", "http://mac-a:8080/v1"),
        ("http://mac-a:8080/v1", "http://mac-a:8080", "http://mac-a:8080/v1"),
        ("http://mac-a:8080/v1/", "http://mac-a:8080", "http://mac-a:8080/v1"),
        ("http://mac-a:8080/v1/chat/completions", "http://mac-a:8080", "http://mac-a:8080/v1"),
        (" HTTP://Mac-A:8080 ", "http://mac-a:8080", "http://mac-a:8080/v1"),
        ("mac-a:8080", "http://mac-a:8080", "http://mac-a:8080/v1"),
        ("mac-a", "http://mac-a:8080", "http://mac-a:8080/v1"),
        ("mac-a/v1", "http://mac-a:8080", "http://mac-a:8080/v1"),
        ("192.168.1.5:9000", "http://192.168.1.5:9000", "http://192.168.1.5:9000/v1"),
        ("8123", "http://127.0.0.1:8123", "http://127.0.0.1:8123/v1"),
        (":8123/v1", "http://127.0.0.1:8123", "http://127.0.0.1:8123/v1"),
        ("::1", "http://[::1]:8080", "http://[::1]:8080/v1"),
        ("[::1]", "http://[::1]:8080", "http://[::1]:8080/v1"),
        ("[::1]:9000", "http://[::1]:9000", "http://[::1]:9000/v1"),
        ("http://[fd00::2]:9000/v1", "http://[fd00::2]:9000", "http://[fd00::2]:9000/v1"),
        ("https://example.org", "https://example.org", "https://example.org/v1"),
        ("https://example.org/kimi", "https://example.org/kimi", "https://example.org/kimi/v1"),
        ("https://openrouter.ai/api/v1", "https://openrouter.ai/api", "https://openrouter.ai/api/v1"),
        (
            "https://example.org/v1beta/openai/",
            "https://example.org/v1beta/openai",
            "https://example.org/v1beta/openai",
        ),
    ],
)
def test_forms_of_an_address(text: str, url: str, base: str) -> None:
    address = parse_address(text)
    assert (address.url, address.base) == (url, base)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "http://",
            "ftp://mac-a",
            "http://mac-a:99999",
            "mac-a:0",
            "99999",
            "http://user:key@mac-a",
            "mac a",
        ),
        *("http://mac-a?key=1", "http://mac-a#x", "unix:/tmp/socket", "kimi k2", "http://[::1", "\x00"),
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert caught.value.hint


@pytest.mark.parametrize("host", ["mac-a", "mac-a.local", "127.0.0.1", "[::1]", "10.0.0.2", "[fe80::1]", "localhost"])
def test_hosts_of_this_network_use_no_proxy(host: str) -> None:
    assert parse_address(f"http://{host}:8080").is_local_network
    assert not parse_address("https://api.example.com").is_local_network
    assert not parse_address("http://8.8.8.8:8080").is_local_network


@pytest.mark.parametrize(
    ("address", "command"),
    [
        ("9999", "`kimi-mlx serve MODEL --port 9999`"),
        ("mac-a:8080", "`kimi-mlx serve MODEL --host 0.0.0.0 --api-key-file FILE`"),
    ],
)
def test_the_hint_starts_a_server_at_the_address(address: str, command: str) -> None:
    client = HttpClient(parse_address(address), None, "")
    assert command in (client.describe(httpx2.ConnectError("refused"), 1).hint or "")
