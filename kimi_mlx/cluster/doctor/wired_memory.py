"""Find wired memory that belongs to no process, which only a restart of the Mac returns. Not yet seen on a Mac.

If a process with a large wired model is killed, macOS may keep the model's memory wired after the process is gone:
414 GiB on a Mac with 512 GB, against 5 GiB after an orderly exit.
Source: gh:jundot/omlx#2184 and #2855; published wired memory of idle Macs (3 to 13 GB with 48 GB).
"""

from __future__ import annotations

import sys
from dataclasses import replace

from kimi_mlx.cluster.doctor.local_facts import output_of
from kimi_mlx.cluster.hosts import probes
from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.units import GIB, format_gib

KERNEL_WIRED_BYTES, KERNEL_WIRED_SHARE = 6 * GIB, 0.03
"""Memory that the kernel and drivers normally wire: a base, and a share of all memory for page tables and the like."""

LEAK_LIMIT_BYTES = 8 * GIB
"""Excess from which wired memory counts as lost: what the kernel wires grows by a few GB over weeks."""


def leaked_bytes(wired_bytes: int, process_bytes: int, memory_bytes: int) -> int:
    """Return a lower bound of the wired memory that belongs to no process.

    Processes wire less than they hold in total, so what exceeds this total and the kernel's normal share has no owner.

    Args:
        wired_bytes: all wired memory.
        process_bytes: memory of all processes except the kernel, wired or not.
        memory_bytes: total memory of the Mac.
    """
    kernel_bytes = KERNEL_WIRED_BYTES + round(memory_bytes * KERNEL_WIRED_SHARE)
    return max(wired_bytes - process_bytes - kernel_bytes, 0)


def check_wired_memory(facts: Facts) -> Finding:
    """Check that no wired memory is left of processes that were killed."""
    wired, processes, memory = facts.wired_bytes, facts.process_bytes, facts.memory_bytes
    if wired is None or memory is None:
        return Finding(facts.host, "wired memory", "ok", "unknown")
    if processes is None:
        return Finding(facts.host, "wired memory", "ok", f"{format_gib(wired)}; the memory of processes is unknown")
    numbers = f"{format_gib(wired)} wired; all processes together hold {format_gib(processes)}"
    leaked = leaked_bytes(wired, processes, memory)
    if leaked < LEAK_LIMIT_BYTES:
        return Finding(facts.host, "wired memory", "ok", numbers)
    message = f"{numbers}: at least {format_gib(leaked)} belong to no process, probably to one that was killed"
    return Finding(facts.host, "wired memory", "problem", message, "restart this Mac; nothing else returns this memory")


def find_lost_memory() -> Finding | None:
    """Return the problem of this Mac if wired memory belongs to no process; None elsewhere.

    `top`, which takes a second, runs only if there is much wired memory.
    """
    if sys.platform != "darwin":
        return None
    _, wired_bytes = probes.vm_stat(output_of("vm_stat"))
    memory_bytes = probes.number(output_of("sysctl", "-n", "hw.memsize").strip())
    facts = Facts("this Mac", True, memory_bytes=memory_bytes, wired_bytes=wired_bytes, process_bytes=0)
    if check_wired_memory(facts).state == "ok":
        return None
    process_bytes = probes.process_memory(output_of("top", "-l", "1", "-stats", "pid,mem"))
    finding = check_wired_memory(replace(facts, process_bytes=process_bytes))
    return None if finding.state == "ok" else finding
