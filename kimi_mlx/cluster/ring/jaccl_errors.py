"""Meanings of JACCL's error messages. Not yet seen on hardware.

Sources: MLX's source (mlx/distributed/jaccl); reports of users: mlx#3207 (a table of errors), #3467, #3777, #4209,
exo#1847, #1973.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class JacclError:
    """A known error of JACCL.

    Args:
        pattern: regular expression for a line that a rank printed, case-insensitive.
        meaning: explanation of the error.
        remedy: advice, with the command to type.
    """

    pattern: str
    meaning: str
    remedy: str


_LEFT_OVER = "end ranks that are left over (`pgrep -fl kimi_mlx` on each host); if that does not help, restart that Mac"
_BRIDGE = (
    "switch the Thunderbolt Bridge off on each host: "
    '`sudo networksetup -setnetworkserviceenabled "Thunderbolt Bridge" off && sudo ifconfig bridge0 down`'
)
_NAMES = "device names change with restarts and cables: search for them again, without the old hostfile"

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
        "a mesh needs a cable between every two Macs; `--backend jaccl-ring` a circle; search for the devices again",
    ),
)
"""Errors that users reported, more specific patterns first."""


def explain_jaccl(text: str) -> str | None:
    """Return the meaning and the remedy of the first known JACCL error in `text`, or None."""
    for line in text.splitlines():
        if "[jaccl]" not in line:
            continue
        for error in JACCL_ERRORS:
            if re.search(error.pattern, line, re.IGNORECASE):
                return f"{error.meaning}: {error.remedy}"
    return None
