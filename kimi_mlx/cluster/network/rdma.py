"""RDMA over Thunderbolt: whether a Mac is ready for it, and what JACCL's errors mean. Not yet seen on hardware.

Sources: Apple's technical note TN3205; MLX's documentation and source (mlx/distributed/jaccl); what users met:
mlx#3207 (a table of errors), #3467, #3777, #4209, exo#1847, #1973.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kimi_mlx.cluster.doctor.findings import Finding
from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.network.links import BridgeConflict

FIRST_MACOS = (26, 2)
"""With which RDMA over Thunderbolt came."""

ENABLE = (
    "shut it down, hold the power button until the start-up options appear, choose Options, open "
    "Utilities > Terminal, type `rdma_ctl enable` and restart (Apple's TN3205; it cannot be done over ssh)"
)
RING = "`--backend ring` does without"


def check_rdma(facts: Facts, is_wanted: bool) -> Finding:
    """Whether a host can use RDMA over Thunderbolt.

    Args:
        facts: of the host.
        is_wanted: JACCL is to be used; otherwise nothing of this is in the way.
    """
    message, remedy = _rdma(facts)
    if remedy is None or not is_wanted:
        return Finding(facts.host, "RDMA", "ok", message)
    return Finding(facts.host, "RDMA", "trouble", message, f"{remedy}; {RING}")


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


def check_bridge(host: str, conflict: BridgeConflict | None, is_rdma_wanted: bool) -> Finding:
    """Whether the Thunderbolt Bridge holds ports that RDMA needs; a ring over TCP may use the bridge."""
    if conflict is None:
        return Finding(host, "bridge", "ok", "no Thunderbolt Bridge is in the way of RDMA")
    if not is_rdma_wanted:
        return Finding(host, "bridge", "ok", f"the Thunderbolt Bridge `{conflict.interface}` is on")
    return Finding(host, "bridge", "trouble", conflict.message, conflict.hint)


@dataclass(frozen=True)
class JacclError:
    """An error of JACCL.

    Args:
        pattern: sought in what a rank has printed, upper or lower case.
        meaning: what is behind it.
        remedy: what to do.
    """

    pattern: str
    meaning: str
    remedy: str


_LEFT_OVER = "end ranks that are left over (`pgrep -fl kimi_mlx` on each host); if that does not help, restart that Mac"
_BRIDGE = (
    "switch the Thunderbolt Bridge off on each host: "
    '`sudo networksetup -setnetworkserviceenabled "Thunderbolt Bridge" off && sudo ifconfig bridge0 down`'
)
_NAMES = "device names change with restarts and cables: let them be found anew, without the old hostfile"

JACCL_ERRORS = (
    JacclError(
        r"RTR failed with errno 22\b",
        "errno 22 (EINVAL): the port belongs to the Thunderbolt Bridge, has no IPv4 address, or RDMA is stuck there",
        f"{_BRIDGE}; give the port an address; after a crash restart all hosts",
    ),
    JacclError(
        r"RTR failed with errno 96\b",
        "errno 96: the port has no usable address for RDMA, or leftovers of earlier runs hold what it needs",
        f"{_BRIDGE}; {_LEFT_OVER}",
    ),
    JacclError(
        r"creating the queue pair failed.*\b16\b",
        "errno 16 (EBUSY): the device has no queue pair left (10 were counted on macOS 26.5); waiting does not help",
        _LEFT_OVER,
    ),
    JacclError(r"errno[ =]*16\b", "errno 16 (EBUSY): a crashed run still holds RDMA's resources", _LEFT_OVER),
    JacclError(
        r"couldn't connect \(error: 60\)",
        "errno 60 (ETIMEDOUT): rank 0 does not answer: not started yet, wrong address, or a firewall; "
        "the cause is often an earlier error of another rank",
        "look at the first error in the logs of all ranks; check with `kimi-mlx doctor`",
    ),
    JacclError(
        r"(errno|error:|error code)[ =]*60\b",
        "errno 60 (ETIMEDOUT): the peer is not at the other end of this port: other cable, other device, other macOS",
        f"{_NAMES}; `ibv_devinfo` must show PORT_ACTIVE at both ends; bring all Macs to the same macOS build",
    ),
    JacclError(
        r"(send|recv) failed with (errno|error code)[ =]*2\b",
        "errno 2 (ENOENT): the link was lost during the work",
        "check the cable and that no Mac sleeps (`sudo pmset -a sleep 0`); if it stays, restart all hosts",
    ),
    JacclError(
        r"could not find device|could not open device|errno[ =]*2\b",
        "an RDMA device of the hostfile is not there",
        f"{_NAMES}; `ibv_devices` lists them",
    ),
    JacclError(
        r"protection domain|completion queue|register memory region failed",
        "RDMA's resources are used up, as after many starts, or there is no RDMA device",
        f"`ibv_devices` must list devices; {_LEFT_OVER}",
    ),
    JacclError(
        r"no IPv4-mapped GID",
        "a Thunderbolt port has no IPv4 address, and RDMA needs one",
        f"{_BRIDGE}; then `sudo ifconfig enN inet 169.254.X.Y netmask 255.255.0.0 alias`, X.Y different on each host",
    ),
    JacclError(
        r"(send|recv) failed with (errno|error code)",
        "the link was lost during the work",
        "check the cables; if it stays, restart all hosts",
    ),
    JacclError(
        r"do not form a valid (mesh|ring)|valid mesh or a valid ring|full connectivity matrix",
        "the RDMA devices of the hostfile do not fit the cables that JACCL needs",
        "a mesh needs a cable between every two Macs; `--backend jaccl-ring` a circle; let the devices be found anew",
    ),
)
"""What users have met, the more special first."""


def explain_jaccl(text: str) -> str | None:
    """What an error of JACCL in a rank's last words means, and the remedy; None if there is none that we know."""
    for line in text.splitlines():
        if "[jaccl]" not in line:
            continue
        for error in JACCL_ERRORS:
            if re.search(error.pattern, line, re.IGNORECASE):
                return f"{error.meaning}: {error.remedy}"
    return None
