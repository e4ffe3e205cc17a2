"""What commands of macOS and Linux print about a machine, read into numbers. Pure; None where nothing fits.

Formats: xnu's vm_stat, Apple's TN3205 (`ibv_devices`, `ibv_devinfo`), POSIX `df -P`, Linux' /proc/meminfo.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


def number(text: str | None) -> int | None:
    """A whole number without a sign."""
    return int(text) if text is not None and text.isascii() and text.isdecimal() else None


def seconds(text: str | None) -> float | None:
    """Seconds since 1970, with a fraction or without."""
    return float(text) if text is not None and re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else None


def vm_stat(text: str) -> tuple[int | None, int | None]:
    """Bytes that programs could have, and bytes that are wired.

    What programs could have: free pages, pages that only repeat files (vm_stat counts speculative ones among them,
    but not among the free), and purgeable ones.
    """
    page = re.search(r"page size of (\d+) bytes", text)
    counts = {name.strip('"'): int(count) for name, count in re.findall(r"^(.+?):\s+(\d+)\.?$", text, re.MULTILINE)}
    if page is None or "Pages free" not in counts:
        return None, None
    free = sum(counts.get(name, 0) for name in ("Pages free", "File-backed pages", "Pages purgeable"))
    wired = counts.get("Pages wired down")
    return free * int(page[1]), None if wired is None else wired * int(page[1])


def meminfo(text: str, name: str) -> int | None:
    """A line of /proc/meminfo, such as `MemTotal`, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def disk_free(text: str) -> int | None:
    """The column `Available` of a line of `df -Pk`, in bytes; the first and the last column may hold blanks."""
    found = re.search(r"\s(\d+)\s+(\d+)\s+(-?\d+)\s+(?:\d+%|-)\s+/", text)
    return max(int(found[3]), 0) * 1024 if found else None


def firewall(text: str) -> int | None:
    """The state that `socketfilterfw --getglobalstate` prints: 0 off, 1 on, 2 blocks all."""
    found = re.search(r"State = (\d)", text)
    return int(found[1]) if found else None


def rdma_ports(devices: str | None, details: str) -> Mapping[str, str] | None:
    """RDMA devices and the states of their ports.

    Args:
        devices: what `ibv_devices` printed; None if there is no such command.
        details: what `ibv_devinfo` printed.

    Returns:
        Device -> state, such as `PORT_ACTIVE`; an empty text where `ibv_devinfo` does not tell.
    """
    if devices is None:
        return None
    states: dict[str, str] = {}
    for block in re.split(r"^\s*hca_id:\s*", details, flags=re.MULTILINE)[1:]:
        state = re.search(r"^\s*state:\s+(\w+)", block, re.MULTILINE)
        states[block.split()[0]] = state[1] if state else ""
    return {name: states.get(name, "") for name in re.findall(r"^\s*(rdma_\w+)", devices, re.MULTILINE)}
