"""The doctor's checks of one host. Pure: facts in, findings out."""

from __future__ import annotations

import shlex

from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.launch import FAST_SYNC
from kimi_mlx.cluster.hosts.machine import gpu_limit
from kimi_mlx.cluster.hosts.ssh import ScriptResult
from kimi_mlx.cluster.hosts.ssh_errors import explain_ssh
from kimi_mlx.units import GIB, format_bytes, format_gib, format_seconds

SYSTEM_RESERVE_BYTES = 8 * GIB
"""Of a machine's memory, what macOS and the rest keep."""

CLOCK_LIMIT_S = 5.0
"""How far clocks may be apart before logs and certificates become confusing."""

INSTALL = "bring the same version to all: `kimi-mlx launch --hosts ... --install`"
_FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"


def check_reachable(answer: ScriptResult) -> Finding:
    """Whether the host answers over ssh."""
    if answer.is_ok:
        return Finding(answer.host, "reachable", "ok", f"answered in {format_seconds(answer.seconds)}")
    error = explain_ssh(answer)
    return Finding(answer.host, "reachable", "problem", error.message, error.hint)


def check_complete(facts: Facts) -> Finding:
    """Whether the host could be asked about everything."""
    if facts.is_complete:
        return Finding(facts.host, "facts", "ok", "all facts are known")
    return Finding(facts.host, "facts", "warning", "a command hung there: not all facts are known", "try again")


def check_python(facts: Facts, asked: str | None = None) -> Finding:
    """Whether it has a Python with kimi-mlx and MLX, for its own processor.

    Args:
        facts: of the host.
        asked: the one interpreter that was looked for; None if any will do.
    """
    python = facts.python
    if python is None and asked is not None and not facts.broken_interpreters:
        remedy = "give a path that is there on every host, or leave `--python` out"
        return Finding(facts.host, "python", "problem", f"there is no `{asked}`", remedy)
    if python is None:
        broken = "".join(f"; `{path}` does not run" for path in facts.broken_interpreters)
        return Finding(facts.host, "python", "problem", f"no Python was found{broken}", INSTALL)
    if missing := [name for name in ("kimi-mlx", "mlx") if name not in python.packages]:
        names = " and ".join(f"`{name}`" for name in missing)
        return Finding(facts.host, "python", "problem", f"`{python.path}` has no {names}", INSTALL)
    if facts.is_mac and facts.machine == "arm64" != python.machine:
        message = f"`{python.path}` is built for {python.machine} and runs under Rosetta, where MLX does not"
        return Finding(facts.host, "python", "problem", message, "install a Python for arm64")
    packages = ", ".join(f"{name} {version}" for name, version in python.packages.items())
    return Finding(facts.host, "python", "ok", f"`{python.path}`: Python {python.version}, {packages}")


def check_fast_sync(hosts: str, is_on: bool) -> Finding:
    """Whether the ranks have MLX's fast fence.

    Args:
        hosts: all of them, in words.
        is_on: as the hostfile or the user says.
    """
    if not is_on:
        return Finding(hosts, "fence", "ok", "MLX's own; `--fast-sync` has a faster one, which can wedge the GPU")
    message = f"the fast one is on ({FAST_SYNC}): it can wedge the GPU, so that the Mac must be restarted"
    remedy = "if answers hang, leave out `--fast-sync`, or remove the line from the hostfile's `envs`"
    return Finding(hosts, "fence", "warning", message, remedy)


def check_chip(facts: Facts) -> Finding:
    """Which chip and how much memory; a Mac must have Apple's."""
    memory = "memory unknown" if facts.memory_bytes is None else format_gib(facts.memory_bytes)
    message = f"{facts.chip or facts.machine or 'unknown chip'}, {memory}"
    # A shell under Rosetta says x86_64 too; the chip's name does not.
    if facts.is_mac and facts.machine != "arm64" and not (facts.chip or "").startswith("Apple"):
        return Finding(facts.host, "chip", "problem", f"{message}: MLX needs Apple silicon", "leave this host out")
    if not facts.is_mac:
        return Finding(facts.host, "chip", "ok", f"{message}; no Mac: it computes on its CPU")
    return Finding(facts.host, "chip", "ok", message)


def check_memory(facts: Facts, need_bytes: int | None) -> Finding:
    """Whether a rank's part fits, and fits now.

    Args:
        facts: of the host.
        need_bytes: weights, caches and work space of the host's ranks; None if unknown.
    """
    if need_bytes is None:
        free = "unknown" if facts.free_bytes is None else format_gib(facts.free_bytes)
        message = f"{free} free; what the model needs is known only once it was looked up"
        return Finding(facts.host, "memory", "ok", message)
    total, free, need = facts.memory_bytes, facts.free_bytes, format_gib(need_bytes)
    if total is None:
        return Finding(facts.host, "memory", "warning", f"its memory is unknown; {need} are needed", "try again")
    if need_bytes > (most := max(total - SYSTEM_RESERVE_BYTES, 0)):
        message = f"{need} are needed, of {format_gib(total)} at most {format_gib(most)} can be used"
        return Finding(
            facts.host,
            "memory",
            "problem",
            message,
            "add a host, or take a smaller model: `kimi-mlx models` says what each needs",
        )
    wired = "" if facts.wired_bytes is None else f", {format_gib(facts.wired_bytes)} are wired"
    if free is not None and need_bytes > free:
        remedy = (
            "quit programs that use much; if `Wired Memory` in Activity Monitor stays high, restart: "
            "a process that was killed may not have given its memory back"
        )
        return Finding(
            facts.host, "memory", "problem", f"{need} are needed, {format_gib(free)} are free{wired}", remedy
        )
    now = "" if free is None else f", {format_gib(free)} are free{wired}"
    return Finding(facts.host, "memory", "ok", f"{need} are needed{now}")


def check_wired_limit(facts: Facts, need_bytes: int | None) -> Finding:
    """Whether macOS lets the GPU have a rank's part; never changes it, only prints the command.

    Args:
        facts: of the host.
        need_bytes: weights, caches and work space of the host's ranks; None if unknown.
    """
    if not facts.is_mac:
        return Finding(facts.host, "wired limit", "ok", "there is none")
    if need_bytes is None:
        return Finding(facts.host, "wired limit", "ok", "what the model needs is unknown")
    if facts.memory_bytes is None:
        return Finding(facts.host, "wired limit", "warning", "its memory is unknown", "try again")
    set_mb = facts.wired_limit_mb
    limit = gpu_limit(facts.memory_bytes, None if set_mb is None else str(set_mb))
    origin = "set" if set_mb else "about, by default"
    numbers = f"{format_gib(need_bytes)} are needed, the GPU may have {format_gib(limit)} ({origin})"
    if need_bytes <= limit:
        return Finding(facts.host, "wired limit", "ok", numbers)
    wanted_bytes = -(-need_bytes // GIB) * GIB
    if wanted_bytes > facts.memory_bytes - SYSTEM_RESERVE_BYTES:
        message = f"{numbers}, and {format_gib(SYSTEM_RESERVE_BYTES)} must be left to the system"
        remedy = "add a host, or take a smaller model: `kimi-mlx models` says what each needs"
        return Finding(facts.host, "wired limit", "problem", message, remedy)
    remedy = f"until its next restart: `sudo sysctl iogpu.wired_limit_mb={wanted_bytes // 1024**2}`"
    return Finding(facts.host, "wired limit", "problem", numbers, remedy)


def check_disk(facts: Facts, need_bytes: int | None) -> Finding:
    """Whether there is room for what has still to be stored (0: all is there; None: nobody knows how much that is)."""
    free, place = facts.disk_free_bytes, facts.stores_folder
    if free is None:
        return Finding(facts.host, "disk", "warning", f"the room for `{place}` is unknown", f"`df -h {_quoted(place)}`")
    if not need_bytes:
        wanted = "no more" if need_bytes == 0 else "an unknown size"
        return Finding(facts.host, "disk", "ok", f"{wanted} is needed, {format_bytes(free)} are free for `{place}`")
    message = f"{format_bytes(need_bytes)} are needed, {format_bytes(free)} are free for `{place}`"
    if need_bytes > free:
        remedy = "make room, or keep stores on another disk: `export KIMI_MLX_STORES=/Volumes/...`"
        return Finding(facts.host, "disk", "problem", message, remedy)
    return Finding(facts.host, "disk", "ok", message)


def clock_offset(facts: Facts, answer: ScriptResult) -> tuple[float, float] | None:
    """How far a host's clock is ahead of ours, and by how much that may be wrong, in seconds; None if unknown.

    The middle of the script's time there is compared with the middle of the question's time here; they are apart by
    at most half of what the way there and back took.
    """
    if facts.clock_start is None or facts.clock_end is None:
        return None
    there = (facts.clock_start + facts.clock_end) / 2
    here = answer.started + answer.seconds / 2
    return there - here, max(answer.seconds - (facts.clock_end - facts.clock_start), 0) / 2


def check_clock(facts: Facts, answer: ScriptResult) -> Finding:
    """Whether the host's clock agrees with ours."""
    skew = clock_offset(facts, answer)
    if skew is None:
        return Finding(facts.host, "clock", "warning", "its clock is unknown", "try again")
    apart, doubt = abs(skew[0]), skew[1]
    if apart - doubt > CLOCK_LIMIT_S:
        way = "ahead of" if skew[0] > 0 else "behind"
        remedy = "`sudo sntp -sS time.apple.com`" if facts.is_mac else "`sudo timedatectl set-ntp true`"
        return Finding(facts.host, "clock", "warning", f"{format_seconds(apart)} {way} this machine's", remedy)
    return Finding(facts.host, "clock", "ok", f"within {format_seconds(apart + doubt)} of this machine's")


def check_firewall(facts: Facts) -> Finding:
    """Whether macOS' application firewall lets ranks connect."""
    if facts.firewall == 2:
        remedy = f"`sudo {_FIREWALL} --setblockall off`"
        return Finding(facts.host, "firewall", "problem", "it blocks all incoming connections", remedy)
    if facts.firewall == 1:
        path = _quoted(facts.python.path if facts.python else "/path/to/python")
        remedy = f"`sudo {_FIREWALL} --add {path} && sudo {_FIREWALL} --unblockapp {path}`"
        return Finding(facts.host, "firewall", "warning", "it is on, and may keep ranks from connecting", remedy)
    return Finding(facts.host, "firewall", "ok", "off" if facts.firewall == 0 else "no application firewall known")


def _quoted(path: str | None) -> str:
    return shlex.quote(path or "")
