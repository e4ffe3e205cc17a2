"""What a host is and has: asked in one trip by `facts.sh`, read into a frozen value.

Not yet seen on a Mac; the tests read outputs that others have captured.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TypeVar

from kimi_mlx.cluster.hosts import probes
from kimi_mlx.cluster.hosts.versions import PACKAGES, describe
from kimi_mlx.errors import SshError

T = TypeVar("T")

FACTS_LIMIT_S = 45.0
"""For one host, connecting included; usually it takes one or two seconds."""

VENV_PYTHON = "venv/bin/python"
"""Where the interpreter of `--install` is, below the user's data folder; facts.sh looks there."""

LINUX_HINTS = """\
cd /sys/class/net && for i in *; do
  h=$i
  for f in wireless phy80211 bridge tun_flags device; do [ -e "$i/$f" ] && h="$h $f"; done
  d=$(readlink "$i/device/driver") && h="$h driver=${d##*/}"
  echo "$h"
done
"""
"""Shell script that prints a line per network interface: its name and what /sys knows about it."""


@dataclass(frozen=True)
class Interpreter:
    """A Python of a host.

    Args:
        path: as it was called.
        version: of Python, such as `3.12.4`.
        machine: the processor that it is built for, such as `arm64`.
        packages: name -> version, of those of PACKAGES that it finds.
        code: a digest of kimi-mlx's files; None without kimi-mlx.
    """

    path: str
    version: str
    machine: str
    packages: Mapping[str, str]
    code: str | None

    @property
    def minor(self) -> str:
        """Such as `3.12`."""
        return ".".join(self.version.split(".")[:2])


@dataclass(frozen=True)
class HeldStore:
    """A complete store of one rank.

    Args:
        repository: `owner/name` on the hub, or the path of a folder.
        commit: of the repository.
        placement: such as `hybrid-2-a1b2c3`: strategy, ranks, digest.
        rank: whose it is.
        folder: its place below the stores folder.
        size_bytes: on the disk, and so nearly in memory; None if not told.
    """

    repository: str
    commit: str
    placement: str
    rank: int
    folder: str
    size_bytes: int | None = None


@dataclass(frozen=True)
class Facts:
    """What a host has said of itself. None: it has no such thing, or did not tell.

    Args:
        host: as the user names it.
        is_complete: whether the script came to its end.
        hostname: as the host names itself.
        system: `Darwin` or `Linux`.
        machine: processor, such as `arm64`.
        macos_version: such as `26.3`.
        macos_build: such as `25D125`.
        chip: such as `Apple M3 Ultra`.
        memory_bytes: all of it.
        free_bytes: what programs could have: free, or kept only for files and caches.
        wired_bytes: what cannot be moved now, the GPU's included.
        wired_limit_mb: `iogpu.wired_limit_mb`, in MiB; 0 stands for the system's default.
        home: the user's home folder.
        data_folder: the user's data of kimi-mlx.
        stores_folder: where stores are kept.
        disk_free_bytes: where stores are kept.
        clock_start: its clock when the script began, in seconds since 1970.
        clock_end: the same when it ended.
        interpreters: interpreters of the host, the requested ones first.
        broken_interpreters: paths of those that do not run.
        uv: path of uv.
        stores: complete ones, the newest first.
        rdma_status: what `rdma_ctl status` says, such as `enabled`.
        rdma_ports: device -> state (`PORT_ACTIVE`), or an empty text where it is not told.
        firewall: macOS' application firewall: 0 off, 1 on, 2 blocks all.
        ifconfig: what `ifconfig -a` printed (macOS).
        hardware_ports: what `networksetup -listallhardwareports` printed (macOS).
        thunderbolt: what `system_profiler SPThunderboltDataType -json` printed (macOS).
        ip_addr: what `ip -j addr` printed (Linux).
        linux_hints: what LINUX_HINTS printed (Linux).
    """

    host: str
    is_complete: bool
    hostname: str | None = None
    system: str | None = None
    machine: str | None = None
    macos_version: str | None = None
    macos_build: str | None = None
    chip: str | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None
    wired_bytes: int | None = None
    wired_limit_mb: int | None = None
    home: str | None = None
    data_folder: str | None = None
    stores_folder: str | None = None
    disk_free_bytes: int | None = None
    clock_start: float | None = None
    clock_end: float | None = None
    interpreters: tuple[Interpreter, ...] = ()
    broken_interpreters: tuple[str, ...] = ()
    uv: str | None = None
    stores: tuple[HeldStore, ...] = ()
    rdma_status: str | None = None
    rdma_ports: Mapping[str, str] | None = None
    firewall: int | None = None
    ifconfig: str | None = None
    hardware_ports: str | None = None
    thunderbolt: str | None = None
    ip_addr: str | None = None
    linux_hints: str | None = None

    @property
    def is_mac(self) -> bool:
        """Whether it runs macOS."""
        return self.system == "Darwin"

    @property
    def python(self) -> Interpreter | None:
        """The interpreter to use: the first with kimi-mlx, else the first."""
        fitting = (each for each in self.interpreters if "kimi-mlx" in each.packages)
        return next(fitting, self.interpreters[0] if self.interpreters else None)


def facts_script(pythons: Sequence[str] = (), envs: Sequence[str] = (), *, is_search: bool = True) -> str:
    """The script that asks for the facts.

    Args:
        pythons: absolute paths of interpreters to look at first.
        envs: `NAME=value` of the hostfile, such as where stores are kept.
        is_search: whether to look for other interpreters: that of `--install`, then `python3`.
    """
    wanted = {
        "facts_pythons": "\n".join(pythons),
        "facts_search": str(int(is_search)),
        "facts_linux_hints": LINUX_HINTS,
        "facts_versions": source("cluster/hosts/versions.py"),
    }
    exports = "".join(f"export {shlex.quote(each)}\n" for each in envs)
    return exports + with_variables(wanted, source("cluster/hosts/facts.sh"))


def with_variables(values: Mapping[str, str], script: str) -> str:
    """A script of the shell that begins by setting variables, to any text but NUL."""
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items()) + script


@cache
def source(name: str) -> str:
    """Return the text of a file of this package, to be sent to hosts."""
    return files("kimi_mlx").joinpath(name).read_text(encoding="utf-8")


def own_interpreter() -> Interpreter:
    """The one that runs this."""
    found = parse_interpreter(json.dumps(describe(sys.executable)))
    assert found is not None
    return found


def parse_facts(host: str, text: str) -> Facts:
    """Read what the script printed, whole or in part.

    Raises:
        SshError: it is not the script's output at all.
    """
    values = _values(host, text)

    def word(key: str) -> str | None:
        return values[key][0].strip() or None if key in values else None

    def raw(key: str) -> str | None:
        return "\n".join(values[key]) + "\n" if key in values else None

    meminfo = raw("meminfo") or ""
    free, wired = probes.vm_stat(raw("vm_stat") or "")
    return Facts(
        host=host,
        is_complete="complete" in values,
        hostname=word("hostname"),
        system=word("system"),
        machine=word("machine"),
        macos_version=word("macos_version"),
        macos_build=word("macos_build"),
        chip=word("chip"),
        memory_bytes=probes.number(word("memory_bytes")) or probes.meminfo(meminfo, "MemTotal"),
        free_bytes=free if free is not None else probes.meminfo(meminfo, "MemAvailable"),
        wired_bytes=wired,
        wired_limit_mb=probes.number(word("wired_limit_mb")),
        home=word("home"),
        data_folder=word("data_folder"),
        stores_folder=word("stores_folder"),
        disk_free_bytes=probes.disk_free(word("disk") or ""),
        clock_start=probes.seconds(word("clock")),
        clock_end=probes.seconds(word("clock_end")),
        interpreters=_some(map(parse_interpreter, values.get("interpreter", ()))),
        broken_interpreters=tuple(values.get("broken_interpreter", ())),
        uv=word("uv"),
        stores=_some(map(_store, values.get("store", ()))),
        rdma_status=word("rdma_ctl"),
        rdma_ports=probes.rdma_ports(raw("ibv_devices"), raw("ibv_devinfo") or ""),
        firewall=probes.firewall(raw("firewall") or ""),
        ifconfig=raw("ifconfig"),
        hardware_ports=raw("hardware_ports"),
        thunderbolt=raw("thunderbolt"),
        ip_addr=raw("ip_addr"),
        linux_hints=raw("linux_hints"),
    )


def _values(host: str, text: str) -> dict[str, list[str]]:
    """Key -> its lines; what login shells print before the first key is left out."""
    _, start, rest = ("\n" + text).partition("\nkimi_mlx_facts=1\n")
    if not start:
        raise SshError(
            f"`{host}` did not answer as expected: {text.strip()[:200]!r}",
            hint=f"what does `ssh {shlex.quote(host)} sh -c true` print? It should print nothing",
        )
    values: dict[str, list[str]] = {}
    for key, value in re.findall(r"^([a-z_]+)=(.*)$", rest, re.MULTILINE):
        values.setdefault(key, []).append(value)
    return values


def _some(values: Iterable[T | None]) -> tuple[T, ...]:
    return tuple(value for value in values if value is not None)


def parse_interpreter(line: str) -> Interpreter | None:
    """Read what kimi_mlx.cluster.hosts.versions has found; None if it is something else."""
    try:
        found = {str(key): str(value) for key, value in json.loads(line).items()}
        packages = {name: found[name] for name in PACKAGES if name in found}
        return Interpreter(found["path"], found["python"], found["machine"], packages, found.get("code"))
    except (ValueError, KeyError, AttributeError):
        return None


def _store(line: str) -> HeldStore | None:
    """From `owner--name/<commit>/<placement>/rank-<n>`, repository and commit; the manifest's words count for more."""
    folder, repository, commit, kilobytes = [*line.split("\t"), "", "", ""][:4]
    parts = folder.split("/")
    if len(parts) != 4 or (rank := probes.number(parts[3].removeprefix("rank-"))) is None:
        return None
    size = probes.number(kilobytes)
    return HeldStore(
        repository or parts[0].replace("--", "/", 1),
        commit or parts[1],
        parts[2],
        rank,
        folder,
        None if size is None else size * 1024,
    )
