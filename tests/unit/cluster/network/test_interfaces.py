"""Parse interfaces and their kind from the output of the host's commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from ipaddress import IPv4Interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cluster.network.interfaces import LINUX_COMMANDS, linux_interfaces, macos_interfaces, parse_hardware_ports
from kimi_mlx.errors import LinkError
from tests.unit.cluster.captures import capture, linux, mac


def test_mac_with_active_thunderbolt_bridge() -> None:
    studio = {each.name: each for each in mac("studio")}
    assert [name for name, each in studio.items() if each.kind == "thunderbolt"] == [
        "en2", "en3", "en4", "en5", "en6", "en7", "bridge0",
    ]  # fmt: skip
    bridge = studio["bridge0"]
    assert bridge.addresses == (IPv4Interface("169.254.87.12/16"),)
    assert bridge.is_up
    assert bridge.members == ("en2", "en3", "en4", "en5", "en6", "en7")
    assert (studio["en0"].kind, studio["en0"].addresses) == ("ethernet", (IPv4Interface("192.168.1.10/24"),))
    assert studio["en0"].mac == "02:00:5e:00:53:00"
    assert (studio["en8"].kind, studio["en8"].is_up) == ("ethernet", False)
    assert studio["en1"].kind == "wifi"
    assert studio["lo0"].kind == "loopback"
    assert {studio[name].kind for name in ("utun0", "utun4", "awdl0", "gif0", "anpi0")} == {"other"}
    assert studio["utun4"].addresses == (IPv4Interface("100.100.0.1/32"),)


def test_mac_set_up_for_rdma_has_port_addresses_and_no_bridge() -> None:
    studio = {each.name: each for each in mac("studio-rdma", "studio")}
    assert studio["en3"].addresses == (IPv4Interface("192.168.0.1/30"),)
    assert not studio["bridge0"].is_up


def test_bridge_of_virtual_machines_is_not_thunderbolt() -> None:
    macbook = {each.name: each for each in mac("macbook")}
    assert macbook["bridge0"].kind == "thunderbolt"
    assert macbook["bridge100"].kind == "other"


def test_bridge_of_thunderbolt_ports_is_found_without_its_name() -> None:
    unnamed = capture("studio-hardware-ports.txt").replace("Thunderbolt Bridge", "x").replace("bridge0", "x")
    found = {each.name: each for each in macos_interfaces(capture("studio-ifconfig.txt"), unnamed)}
    assert found["bridge0"].kind == "thunderbolt"


@pytest.mark.parametrize(
    ("port", "kind"),
    [
        ("Thunderbolt 3", "thunderbolt"),
        ("Thunderbolt Bridge", "thunderbolt"),
        ("Thunderbolt 5 Bridge", "thunderbolt"),
        ("Thunderbolt Ethernet", "ethernet"),
        ("Thunderbolt Ethernet Slot 1", "ethernet"),
        ("USB 10/100/1G/2.5G LAN", "ethernet"),
        ("Wi-Fi", "wifi"),
        ("iPhone USB", "other"),
        ("Bluetooth PAN", "other"),
    ],
)
def test_kind_of_a_hardware_port(port: str, kind: str) -> None:
    text = f"Hardware Port: {port}\nDevice: en9\nEthernet Address: N/A\n"
    assert parse_hardware_ports(text) == {"en9": port}
    [interface] = macos_interfaces("en9: flags=8863<UP,RUNNING> mtu 1500\n", text)
    assert interface.kind == kind


@given(st.text(), st.text())
def test_macos_parser_accepts_any_text(ifconfig: str, ports: str) -> None:
    assert all(interface.name for interface in macos_interfaces(ifconfig, ports))


@given(st.integers(0, 2**32 - 1), st.integers(0, 32))
def test_any_address_and_mask_is_parsed(address: int, prefix: int) -> None:
    expected = IPv4Interface((address, prefix))
    mask = int(expected.netmask)
    text = f"en0: flags=8863<UP> mtu 1500\n\tinet {expected.ip} netmask 0x{mask:08x} broadcast 1.2.3.4\n"
    assert macos_interfaces(text, "")[0].addresses == (expected,)


def test_linux_with_containers_and_a_vpn() -> None:
    kinds = {each.name: each.kind for each in linux() if each.addresses}
    assert kinds == {"lo": "loopback", "eth0": "ethernet", "docker0": "other", "tun0": "other"}
    found = {each.name: each for each in linux()}
    assert found["docker0"].members == ("veth1a2b3c",)
    assert (found["eth0"].is_up, found["tun0"].is_up) == (True, False)


def test_linux_with_wifi_thunderbolt_and_a_bridge_with_a_cable() -> None:
    entries = [
        {"ifname": name, "flags": ["UP", "LOWER_UP"], "link_type": "ether", "addr_info": []}
        for name in ("wlp2s0", "thunderbolt0", "tb1", "br0", "tap0")
    ]
    entries.append({"ifname": "enp1s0", "flags": [], "link_type": "ether", "addr_info": [], "master": "br0"})
    properties = """\
wlp2s0 wireless device driver=iwlwifi
tb1 device driver=thunderbolt-net
br0 bridge
enp1s0 device driver=igc
tap0 tun_flags
"""
    assert [each.kind for each in linux_interfaces(json.dumps(entries), properties)] == [
        "wifi", "thunderbolt", "thunderbolt", "ethernet", "other", "ethernet",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "no", "3", '["x"]', "[[1]]", '[{"x": 1}]', "{}x", "null"])
def test_invalid_output_of_ip_is_an_error(text: str) -> None:
    with pytest.raises(LinkError, match="`ip -j addr` printed"):
        linux_interfaces(text, "")


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("ip") is None, reason="needs Linux's ip")
def test_this_machine() -> None:
    printed = [subprocess.run(["sh", "-c", command], capture_output=True, text=True) for command in LINUX_COMMANDS]
    found = linux_interfaces(printed[0].stdout, printed[1].stdout)
    assert IPv4Interface("127.0.0.1/8") in [address for each in found for address in each.addresses]
