"""The doctor's checks of a single host. Pure functions from facts to findings."""

from __future__ import annotations

import shlex

from kimi_mlx.cluster.doctor.memory_need import DiskSpace, HostNeed
from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.launch import FAST_SYNC
from kimi_mlx.cluster.hosts.machine import gpu_limit
from kimi_mlx.cluster.hosts.ssh import ScriptResult
from kimi_mlx.cluster.hosts.ssh_errors import explain_ssh
from kimi_mlx.sizing.hosts import MAX_HOSTS, SYSTEM_BYTES, usable_bytes
from kimi_mlx.sizing.ssd import SsdSpeed
from kimi_mlx.units import GB, GIB, format_bytes, format_gib, format_seconds

CLOCK_LIMIT_S = 5.0
"""Clock difference from which logs are hard to compare and certificates may fail."""

SLOW_SSD = 0.6
"""Share of the usual rate below which an SSD is reported as slow."""

INSTALL = "install the same version on all hosts: `kimi-mlx launch --hosts ... --install`"
_FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"


def check_reachable(answer: ScriptResult) -> Finding:
    """Check that the host answers over ssh."""
    if answer.is_ok:
        return Finding(answer.host, "reachable", "ok", f"answered in {format_seconds(answer.seconds)}")
    error = explain_ssh(answer)
    return Finding(answer.host, "reachable", "problem", error.message, error.hint)


def check_complete(facts: Facts) -> Finding:
    """Check that all facts of the host were gathered."""
    if facts.is_complete:
        return Finding(facts.host, "facts", "ok", "all facts are known")
    return Finding(
        facts.host, "facts", "warning", "a command hung on this host; some facts are missing", "run this again"
    )


def check_python(facts: Facts, requested: str | None = None) -> Finding:
    """Check that the host has a Python with kimi-mlx and MLX, built for its processor.

    Args:
        facts: facts of the host.
        requested: path of the only interpreter that was tried; None if any interpreter is accepted.
    """
    python = facts.python
    if python is None and requested is not None and not facts.broken_interpreters:
        remedy = "give a path that exists on every host, or omit `--python`"
        return Finding(facts.host, "python", "problem", f"`{requested}` does not exist", remedy)
    if python is None:
        broken = "".join(f"; `{path}` does not run" for path in facts.broken_interpreters)
        return Finding(facts.host, "python", "problem", f"no Python was found{broken}", INSTALL)
    if missing := [name for name in ("kimi-mlx", "mlx") if name not in python.packages]:
        names = " and ".join(f"`{name}`" for name in missing)
        return Finding(facts.host, "python", "problem", f"`{python.path}` has no {names}", INSTALL)
    if facts.is_mac and facts.machine == "arm64" != python.machine:
        message = f"`{python.path}` is built for {python.machine} and runs under Rosetta, which MLX does not support"
        return Finding(facts.host, "python", "problem", message, "install Python for arm64")
    packages = ", ".join(f"{name} {version}" for name, version in python.packages.items())
    return Finding(facts.host, "python", "ok", f"`{python.path}`: Python {python.version}, {packages}")


def check_fast_sync(hosts: str, is_on: bool) -> Finding:
    """Warn if MLX's fast synchronisation is on.

    Args:
        hosts: names of all hosts, separated by commas.
        is_on: whether the hostfile or `--fast-sync` turns it on.
    """
    if not is_on:
        return Finding(hosts, "fence", "ok", "MLX's default; `--fast-sync` is faster, but may hang the GPU")
    message = f"fast synchronisation is on ({FAST_SYNC}): it may hang the GPU, and then the Mac must be restarted"
    remedy = "if answers hang, omit `--fast-sync`, or remove the line from the hostfile's `envs`"
    return Finding(hosts, "fence", "warning", message, remedy)


def check_chip(facts: Facts) -> Finding:
    """Report chip and memory. A Mac must have an Apple chip."""
    memory = "memory unknown" if facts.memory_bytes is None else format_gib(facts.memory_bytes)
    message = f"{facts.chip or facts.machine or 'unknown chip'}, {memory}"
    # A shell under Rosetta reports x86_64 too; the name of the chip tells them apart.
    if facts.is_mac and facts.machine != "arm64" and not (facts.chip or "").startswith("Apple"):
        return Finding(
            facts.host, "chip", "problem", f"{message}: MLX needs Apple silicon", "remove this host from the cluster"
        )
    if not facts.is_mac:
        return Finding(facts.host, "chip", "ok", f"{message} (not a Mac: will run on the CPU)")
    return Finding(facts.host, "chip", "ok", message)


def check_memory(facts: Facts, need: HostNeed | None, model_bytes: int | None = None) -> Finding:
    """Check that the host's ranks fit in its memory, and in the memory that is free now.

    If only some of their experts fit, the others are read from the SSD, which is slower.

    Args:
        facts: facts of the host.
        need: memory of weights, caches and workspace of the host's ranks; None if unknown.
        model_bytes: bytes of the weights of all ranks; None if unknown.
    """
    if need is None:
        free = "unknown" if facts.free_bytes is None else format_gib(facts.free_bytes)
        message = f"{free} free; the model's needs are known after it has been looked up"
        return Finding(facts.host, "memory", "ok", message)
    total, free, needs = facts.memory_bytes, facts.free_bytes, f"needs {format_gib(need.memory_bytes)}"
    if total is None:
        return Finding(
            facts.host, "memory", "warning", f"{needs}; the memory of this machine is unknown", "run this again"
        )
    usable = usable_bytes(total)
    wired = "" if facts.wired_bytes is None else f" ({format_gib(facts.wired_bytes)} wired)"
    if need.memory_bytes > usable:
        message = f"{_at_least(need)}; this machine has {format_gib(total)}, of which {format_gib(usable)} are usable"
        remedy = _more_memory(total, need, model_bytes)
        limit = usable
    elif free is not None and need.memory_bytes > free:
        message = f"{_at_least(need)}; {format_gib(free)} are free{wired}"
        remedy = (
            "quit programs that use much memory; if `Wired Memory` in Activity Monitor stays high, restart: "
            "a killed process may not have released its memory"
        )
        limit = free
    else:
        current = "" if free is None else f"; {format_gib(free)} are free{wired}"
        return Finding(facts.host, "memory", "ok", f"{needs}{current}")
    kept = need.kept_share(limit if free is None else min(limit, free))
    if kept is None:
        return Finding(facts.host, "memory", "problem", message, remedy)
    return Finding(facts.host, "memory", "warning", f"{message}: {_from_ssd(kept)}", f"for more speed: {remedy}")


def check_wired_limit(facts: Facts, need: HostNeed | None, model_bytes: int | None = None) -> Finding:
    """Check that macOS lets the GPU wire what the host's ranks need. It only prints the command, and never runs it.

    Args:
        facts: facts of the host.
        need: memory of weights, caches and workspace of the host's ranks; None if unknown.
        model_bytes: bytes of the weights of all ranks; None if unknown.
    """
    if not facts.is_mac:
        return Finding(facts.host, "wired limit", "ok", "not a Mac: no limit")
    if need is None:
        return Finding(facts.host, "wired limit", "ok", "the model's needs are unknown")
    if facts.memory_bytes is None:
        return Finding(facts.host, "wired limit", "warning", "the memory of this machine is unknown", "run this again")
    set_mb = facts.wired_limit_mb
    limit = gpu_limit(facts.memory_bytes, None if set_mb is None else str(set_mb))
    origin = "set" if set_mb else "default, estimated"
    numbers = f"needs {format_gib(need.memory_bytes)}; the GPU limit is {format_gib(limit)} ({origin})"
    if need.memory_bytes <= limit:
        return Finding(facts.host, "wired limit", "ok", numbers)
    usable = usable_bytes(facts.memory_bytes)
    limit_bytes = -(-need.memory_bytes // GIB) * GIB
    kept = need.kept_share(limit)
    if limit_bytes > usable and kept is not None:
        if limit >= usable:
            return Finding(facts.host, "wired limit", "ok", f"{numbers}: {_from_ssd(kept)}")
        raised = need.kept_share(usable) or kept
        remedy = f"for more speed: {_raise_limit(usable)}, which keeps {100 * raised:.0f} % of the experts in memory"
        return Finding(facts.host, "wired limit", "warning", f"{numbers}: {_from_ssd(kept)}", remedy)
    smallest_bytes = -(-need.smallest_bytes // GIB) * GIB
    if limit_bytes > usable and smallest_bytes <= usable:
        return Finding(facts.host, "wired limit", "problem", f"{numbers}; {_at_least(need)}", _raise_limit(usable))
    if limit_bytes > usable:
        message = f"{numbers}; {format_gib(SYSTEM_BYTES)} are reserved for the system"
        remedy = _more_memory(facts.memory_bytes, need, model_bytes)
        return Finding(facts.host, "wired limit", "problem", message, remedy)
    if kept is None:
        return Finding(facts.host, "wired limit", "problem", numbers, _raise_limit(limit_bytes))
    remedy = f"for more speed: {_raise_limit(limit_bytes)}, which keeps all of them in memory"
    return Finding(facts.host, "wired limit", "warning", f"{numbers}: {_from_ssd(kept)}", remedy)


def _at_least(need: HostNeed) -> str:
    """Return what a host needs, also with as few experts in memory as possible."""
    text = f"needs {format_gib(need.memory_bytes)}"
    if need.smallest_bytes < need.memory_bytes:
        text += f", at least {format_gib(need.smallest_bytes)} with experts on the SSD"
    return text


def _from_ssd(kept: float) -> str:
    return f"about {100 * kept:.0f} % of the experts stay in memory, the others are read from the SSD"


def _raise_limit(limit_bytes: int) -> str:
    command = f"sudo sysctl iogpu.wired_limit_mb={limit_bytes // 1024**2}"
    return f"run on this host (lasts until its next restart): `{command}`"


def _more_memory(memory_bytes: int, need: HostNeed, model_bytes: int | None) -> str:
    """Return the remedy for a model that does not fit: more hosts, unless even MAX_HOSTS like this one are too few."""
    largest_bytes = MAX_HOSTS * usable_bytes(memory_bytes)
    if model_bytes is not None and model_bytes > largest_bytes:
        if need.experts_bytes and need.smallest_bytes <= largest_bytes:
            return (
                "choose a smaller model (`kimi-mlx models`), or add hosts: with experts on the SSD a few may be enough "
                "(`kimi-mlx plan`)"
            )
        return f"choose a smaller model: even {MAX_HOSTS} hosts like this one are too small (`kimi-mlx models`)"
    return "add a host, or choose a smaller model: `kimi-mlx models` lists their memory needs"


def check_disk(facts: Facts, need_bytes: int | None, download: DiskSpace | None = None) -> Finding:
    """Check that the disk has space for the model.

    Args:
        facts: facts of the host.
        need_bytes: bytes that have yet to be stored; 0 if nothing is missing, None if unknown.
        download: disk of a download without stores; None if the host writes stores.
    """
    space = download or DiskSpace(facts.stores_folder, facts.disk_free_bytes, "KIMI_MLX_STORES")
    free, folder = space.free_bytes, space.folder
    if free is None:
        return Finding(
            facts.host, "disk", "warning", f"free space for `{folder}` is unknown", f"`df -h {_quoted(folder)}`"
        )
    if not need_bytes:
        need = "needs no more space" if need_bytes == 0 else "unknown need"
        return Finding(facts.host, "disk", "ok", f"{need}; {format_bytes(free)} are free for `{folder}`")
    message = f"needs {format_bytes(need_bytes)}; {format_bytes(free)} are free for `{folder}`"
    if need_bytes > free:
        remedy = f"free disk space, or use another disk: `export {space.variable}=/Volumes/...`"
        return Finding(facts.host, "disk", "problem", message, remedy)
    return Finding(facts.host, "disk", "ok", message)


def check_cache_disk(host: str, folder: str, free_bytes: int | None, reserve_bytes: int) -> Finding:
    """Check that the disk of the prompt cache has space: the cache leaves some free for other uses.

    Args:
        host: name of the host.
        folder: folder of the prompt cache.
        free_bytes: free bytes on its disk; None if unknown.
        reserve_bytes: bytes that the prompt cache leaves free.
    """
    if free_bytes is None:
        message = f"free space for the prompt cache in `{folder}` is unknown"
        return Finding(host, "prompt cache", "warning", message, f"`df -h {_quoted(folder)}`")
    message = f"{format_bytes(free_bytes)} are free for the prompt cache in `{folder}`"
    if free_bytes >= reserve_bytes:
        return Finding(host, "prompt cache", "ok", message)
    message += f", which leaves {format_bytes(reserve_bytes)} free for other uses: nothing new is stored"
    remedy = "free disk space, or use another disk: `--cache-dir /Volumes/...`"
    return Finding(host, "prompt cache", "warning", message, remedy)


def check_ssd(host: str, speed: SsdSpeed | str, expected_bytes_per_s: float | None) -> Finding:
    """Report the speed of a host's SSD, and warn if it is far below the expected one.

    Args:
        host: name of the host.
        speed: measured speed, or why it was not measured.
        expected_bytes_per_s: published rate of such a host; None if unknown.
    """
    if isinstance(speed, str):
        remedy = f"{'free disk space, then ' if 'free space' in speed else ''}run `kimi-mlx doctor` again"
        return Finding(host, "SSD", "warning", f"not measured: {speed}", remedy)
    by_depth = ", ".join(f"{depth}: {rate / GB:.2f}" for depth, rate in sorted(speed.bytes_per_s.items()))
    best = speed.best_bytes_per_s
    message = (
        f"reads experts of {format_bytes(speed.block_bytes)} at {best / GB:.2f} GB/s "
        f"(GB/s by reads in flight: {by_depth}) in `{speed.folder}`"
    )
    if expected_bytes_per_s is None or best >= SLOW_SSD * expected_bytes_per_s:
        return Finding(host, "SSD", "ok", message)
    message += f"; {expected_bytes_per_s / GB:.1f} GB/s are usual"
    remedy = (
        "if the model is on an external disk, move it to the internal one (`KIMI_MLX_STORES`); free space, and quit "
        "programs that use the disk"
    )
    return Finding(host, "SSD", "warning", message, remedy)


def clock_offset(facts: Facts, answer: ScriptResult) -> tuple[float, float] | None:
    """Return the offset of a host's clock from ours (positive: ahead) and its uncertainty, in seconds; None if unknown.

    Compares the midpoint of the script's run on the host with the midpoint of the request here. They differ by at most
    half of the round trip.
    """
    if facts.clock_start is None or facts.clock_end is None:
        return None
    host_middle = (facts.clock_start + facts.clock_end) / 2
    own_middle = answer.started_at + answer.seconds / 2
    return host_middle - own_middle, max(answer.seconds - (facts.clock_end - facts.clock_start), 0) / 2


def check_clock(facts: Facts, answer: ScriptResult) -> Finding:
    """Check that the host's clock agrees with ours."""
    offset = clock_offset(facts, answer)
    if offset is None:
        return Finding(facts.host, "clock", "warning", "the host's clock is unknown", "run this again")
    difference, uncertainty = abs(offset[0]), offset[1]
    if difference - uncertainty > CLOCK_LIMIT_S:
        direction = "ahead of" if offset[0] > 0 else "behind"
        remedy = "`sudo sntp -sS time.apple.com`" if facts.is_mac else "`sudo timedatectl set-ntp true`"
        return Finding(
            facts.host, "clock", "warning", f"{format_seconds(difference)} {direction} this machine's", remedy
        )
    return Finding(facts.host, "clock", "ok", f"within {format_seconds(difference + uncertainty)} of this machine's")


def check_firewall(facts: Facts) -> Finding:
    """Check that macOS' application firewall lets ranks connect."""
    if facts.firewall == 2:
        remedy = f"`sudo {_FIREWALL} --setblockall off`"
        return Finding(facts.host, "firewall", "problem", "blocks all incoming connections", remedy)
    if facts.firewall == 1:
        path = _quoted(facts.python.path if facts.python else "/path/to/python")
        remedy = f"`sudo {_FIREWALL} --add {path} && sudo {_FIREWALL} --unblockapp {path}`"
        return Finding(facts.host, "firewall", "warning", "on, may keep ranks from connecting", remedy)
    return Finding(facts.host, "firewall", "ok", "off" if facts.firewall == 0 else "no application firewall known")


def _quoted(path: str | None) -> str:
    return shlex.quote(path or "")
