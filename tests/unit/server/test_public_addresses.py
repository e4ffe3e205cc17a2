"""Which addresses belong to the public internet."""

from __future__ import annotations

import pytest

from kimi_mlx.server.public_addresses import is_public_address, resolve_host


@pytest.mark.parametrize(
    "address",
    ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"],
)
def test_public(address: str) -> None:
    assert is_public_address(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "::1", "::"),
        *("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fdff::1", "fec0::1"),
        *("169.254.1.1", "fe80::1", "fe80::1%en0"),
        *("169.254.169.254", "100.100.100.200", "fd00:ec2::254", "168.63.129.16", "192.0.0.192"),  # cloud metadata
        *("100.64.0.1", "192.0.2.1", "198.18.0.1", "203.0.113.5", "240.0.0.1", "255.255.255.255"),
        *("192.88.99.1", "2001:db8::1", "3fff::1", "5f00::1"),
        *("224.0.0.1", "224.0.1.1", "ff02::1", "ff0e::1"),
        *("::ffff:127.0.0.1", "::ffff:a00:1", "::ffff:169.254.169.254", "::127.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::1", "2002:a00:1::"),
        *("2001:0:808:808::1", "2001::1"),
    ],
)
def test_not_public(address: str) -> None:
    assert not is_public_address(address)


@pytest.mark.parametrize("name", ["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "localhost"])
def test_other_spellings_of_loopback_are_resolved_before_they_are_checked(name: str) -> None:
    addresses = resolve_host(name, 80)
    assert addresses
    assert not any(map(is_public_address, addresses))
