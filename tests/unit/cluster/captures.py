"""Captured output of macOS and Linux commands, parsed; captures/README.md gives the sources."""

from __future__ import annotations

from pathlib import Path

from kimi_mlx.cluster.network.interfaces import Interface, linux_interfaces, macos_interfaces
from kimi_mlx.cluster.network.thunderbolt import ThunderboltPort, thunderbolt_ports


def capture(name: str) -> str:
    """Return the text of a file in `captures/`."""
    return (Path(__file__).parent / "captures" / name).read_text()


def mac(name: str, ports_of: str = "") -> tuple[Interface, ...]:
    """Return the interfaces of `studio`, `studio-rdma` or `macbook`."""
    return macos_interfaces(capture(f"{name}-ifconfig.txt"), capture(f"{ports_of or name}-hardware-ports.txt"))


def linux() -> tuple[Interface, ...]:
    """Return the interfaces of the Linux host."""
    return linux_interfaces(capture("linux-ip-addr.json"), capture("linux-interface-properties.txt"))


def ports(name: str) -> tuple[ThunderboltPort, ...]:
    """Return the Thunderbolt ports of `studio` or `macbook`."""
    return thunderbolt_ports(capture(f"{name}-thunderbolt.json"), capture(f"{name}-hardware-ports.txt"))
