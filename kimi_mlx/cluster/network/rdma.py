"""Check that a Mac is ready for RDMA over Thunderbolt. Not yet tested on hardware.

Sources: Apple's technical note TN3205; MLX's documentation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.network.links import BridgeConflict

FIRST_MACOS = (26, 2)
"""First version of macOS with RDMA over Thunderbolt."""

ENABLE = (
    "shut the Mac down, hold the power button until the start-up options appear, choose Options, open "
    "Utilities > Terminal, type `rdma_ctl enable` and restart (Apple's TN3205; this cannot be done over ssh)"
)
RING = "`--backend ring` works without it"


def check_rdma(facts: Facts, is_required: bool) -> Finding:
    """Check that a host can use RDMA over Thunderbolt.

    Args:
        facts: facts of the host.
        is_required: whether JACCL will be used; if not, missing RDMA is no problem.
    """
    message, remedy = _rdma(facts)
    if remedy is None or not is_required:
        return Finding(facts.host, "RDMA", "ok", message)
    return Finding(facts.host, "RDMA", "problem", message, f"{remedy}; {RING}")


def _rdma(facts: Facts) -> tuple[str, str | None]:
    """Return the state of RDMA, and a remedy if RDMA cannot be used."""
    if not facts.is_mac:
        return "RDMA over Thunderbolt needs a Mac", "remove this host from the cluster"
    if (version := _version(facts.macos_version)) is not None and version < FIRST_MACOS:
        return f"macOS {facts.macos_version} has no RDMA over Thunderbolt; it needs 26.2", "update macOS"
    if facts.rdma_status is None:
        return "`rdma_ctl` is missing: RDMA needs macOS 26.2 and Thunderbolt 5", "update macOS"
    if facts.rdma_status.lower() != "enabled":
        return f"RDMA is not enabled: `rdma_ctl status` says `{facts.rdma_status}`", ENABLE
    ports: Mapping[str, str] = facts.rdma_ports or {}
    if not ports:
        message = "RDMA is enabled, but `ibv_devices` lists no device: RDMA needs Thunderbolt 5"
        return message, "if the Mac has Thunderbolt 5, restart it with the cables plugged in"
    active = [name for name, state in ports.items() if state == "PORT_ACTIVE"]
    if any(ports.values()) and not active:
        message = f"no RDMA port is active ({', '.join(ports)})"
        return message, "check the cable, enable RDMA on the other Mac too, and switch the Thunderbolt Bridge off"
    return f"RDMA is enabled; active: {', '.join(active) or 'unknown'} of {', '.join(ports)}", None


def _version(text: str | None) -> tuple[int, int] | None:
    match = re.match(r"(\d+)(?:\.(\d+))?", text or "")
    return (int(match[1]), int(match[2] or 0)) if match else None


def check_bridge(host: str, conflict: BridgeConflict | None, is_rdma_used: bool) -> Finding:
    """Check that no Thunderbolt Bridge holds ports that RDMA needs. A ring over TCP may use the bridge."""
    if conflict is None:
        return Finding(host, "bridge", "ok", "no Thunderbolt Bridge is on")
    if not is_rdma_used:
        return Finding(host, "bridge", "ok", f"the Thunderbolt Bridge `{conflict.interface}` is on")
    return Finding(host, "bridge", "problem", conflict.message, conflict.hint)
