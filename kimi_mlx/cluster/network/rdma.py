"""Checks whether a Mac is ready for RDMA over Thunderbolt. Not yet seen on hardware.

Sources: Apple's technical note TN3205; MLX's documentation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.network.links import BridgeConflict

FIRST_MACOS = (26, 2)
"""With which RDMA over Thunderbolt came."""

ENABLE = (
    "shut it down, hold the power button until the start-up options appear, choose Options, open "
    "Utilities > Terminal, type `rdma_ctl enable` and restart (Apple's TN3205; it cannot be done over ssh)"
)
RING = "`--backend ring` does without"


def check_rdma(facts: Facts, is_required: bool) -> Finding:
    """Whether a host can use RDMA over Thunderbolt.

    Args:
        facts: of the host.
        is_required: JACCL is to be used; otherwise nothing of this is in the way.
    """
    message, remedy = _rdma(facts)
    if remedy is None or not is_required:
        return Finding(facts.host, "RDMA", "ok", message)
    return Finding(facts.host, "RDMA", "problem", message, f"{remedy}; {RING}")


def _rdma(facts: Facts) -> tuple[str, str | None]:
    """What is the matter, and the remedy if anything is."""
    if not facts.is_mac:
        return "RDMA over Thunderbolt needs a Mac", "leave this host out"
    if (version := _version(facts.macos_version)) is not None and version < FIRST_MACOS:
        return f"macOS {facts.macos_version} has no RDMA over Thunderbolt, 26.2 has", "update macOS"
    if facts.rdma_status is None:
        return "there is no `rdma_ctl`: RDMA needs macOS 26.2 and Thunderbolt 5", "update macOS"
    if facts.rdma_status.lower() != "enabled":
        return f"RDMA is not enabled: `rdma_ctl status` says `{facts.rdma_status}`", ENABLE
    ports: Mapping[str, str] = facts.rdma_ports or {}
    if not ports:
        message = "RDMA is enabled, but `ibv_devices` lists no device: only Thunderbolt 5 has them"
        return message, "on a Mac with Thunderbolt 5 restart once more, cables plugged in"
    active = [name for name, state in ports.items() if state == "PORT_ACTIVE"]
    if any(ports.values()) and not active:
        message = f"no port of RDMA is active ({', '.join(ports)})"
        return message, "check the cable, enable RDMA on the other Mac too, and switch the Thunderbolt Bridge off"
    return f"RDMA is enabled; active: {', '.join(active) or 'unknown'} of {', '.join(ports)}", None


def _version(text: str | None) -> tuple[int, int] | None:
    found = re.match(r"(\d+)(?:\.(\d+))?", text or "")
    return (int(found[1]), int(found[2] or 0)) if found else None


def check_bridge(host: str, conflict: BridgeConflict | None, is_rdma_used: bool) -> Finding:
    """Whether the Thunderbolt Bridge holds ports that RDMA needs; a ring over TCP may use the bridge."""
    if conflict is None:
        return Finding(host, "bridge", "ok", "no Thunderbolt Bridge is in the way of RDMA")
    if not is_rdma_used:
        return Finding(host, "bridge", "ok", f"the Thunderbolt Bridge `{conflict.interface}` is on")
    return Finding(host, "bridge", "problem", conflict.message, conflict.hint)
