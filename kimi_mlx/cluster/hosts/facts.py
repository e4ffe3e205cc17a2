"""Facts about a host: collected by `facts.sh` in one connection, parsed into a frozen value.

Not yet tested on a Mac; the tests use published output of macOS commands.
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

T = TypeVar("T")

FACTS_LIMIT_S = 45.0
"""Time limit per host, including the connection; usually it takes one or two seconds."""

VENV_PYTHON = "venv/bin/python"
"""Path of the interpreter of `--install` in the user's data folder; facts.sh looks there."""

INTERFACE_PROPERTIES = """\
cd /sys/class/net && for i in *; do
  h=$i
  for f in wireless phy80211 bridge tun_flags device; do [ -e "$i/$f" ] && h="$h $f"; done
  d=$(readlink "$i/device/driver") && h="$h driver=${d##*/}"
  echo "$h"
done
"""
"""Shell script that prints one line per network interface: its name and its properties in /sys."""


@dataclass(frozen=True)
class Interpreter:
    """Python interpreter of a host.

    Args:
        path: path by which it was started.
        version: version of Python, such as `3.12.4`.
        machine: processor architecture of the build, such as `arm64`.
        packages: name -> version of the installed packages among PACKAGES.
        code: digest of kimi-mlx's files; None if kimi-mlx is not installed.
        mlx_build: platform for which MLX's wheel was built, such as `macosx_26_0_arm64`; None if unknown. Wheels of one
            version for different systems contain different kernels.
    """

    path: str
    version: str
    machine: str
    packages: Mapping[str, str]
    code: str | None
    mlx_build: str | None = None

    @property
    def minor(self) -> str:
        """Minor version, such as `3.12`."""
        return ".".join(self.version.split(".")[:2])


@dataclass(frozen=True)
class HeldStore:
    """Complete store of one rank.

    Args:
        repository: `owner/name` on the hub, or the path of a folder.
        commit: commit of the repository.
        placement: name of the placement, such as `hybrid-2-a1b2c3`: strategy, ranks, digest.
        rank: rank that the store belongs to.
        folder: path relative to the stores folder.
        size_bytes: size on disk, close to the size in memory; None if unknown.
    """

    repository: str
    commit: str
    placement: str
    rank: int
    folder: str
    size_bytes: int | None = None


@dataclass(frozen=True)
class Facts:
    """Facts about a host. None means that it has no such thing, or did not report it.

    Args:
        host: host as the user names it.
        is_complete: whether the script ran to its end.
        hostname: the host's own name.
        system: `Darwin` or `Linux`.
        machine: processor architecture, such as `arm64`.
        macos_version: version of macOS, such as `26.3`.
        macos_build: build of macOS, such as `25D125`.
        chip: name of the chip, such as `Apple M3 Ultra`.
        memory_bytes: total memory.
        free_bytes: memory available to programs: free, or used only for files and caches.
        wired_bytes: wired memory, including the GPU's.
        process_bytes: memory of all processes except the kernel, wired or not (macOS).
        wired_limit_mb: `iogpu.wired_limit_mb`, in MiB; 0 means the system's default.
        home: the user's home folder.
        data_folder: kimi-mlx's data folder of the user.
        stores_folder: folder of the stores.
        disk_free_bytes: free space on the disk of the stores folder.
        clock_start: the host's clock at the start of the script, in seconds since 1970.
        clock_end: the host's clock at the end of the script.
        interpreters: Python interpreters, the requested ones first.
        broken_interpreters: paths of interpreters that do not run.
        uv: path of uv.
        stores: complete stores, newest first.
        rdma_status: output of `rdma_ctl status`, such as `enabled`.
        rdma_ports: device -> state, such as `PORT_ACTIVE`; empty if unknown.
        firewall: state of macOS' application firewall: 0 off, 1 on, 2 blocks all connections.
        ifconfig: output of `ifconfig -a` (macOS).
        hardware_ports: output of `networksetup -listallhardwareports` (macOS).
        thunderbolt: output of `system_profiler SPThunderboltDataType -json` (macOS).
        ip_addr: output of `ip -j addr` (Linux).
        interface_properties: output of INTERFACE_PROPERTIES (Linux).
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
    process_bytes: int | None = None
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
    interface_properties: str | None = None

    @property
    def is_mac(self) -> bool:
        """Whether the host runs macOS."""
        return self.system == "Darwin"

    @property
    def python(self) -> Interpreter | None:
        """Interpreter to use: the first one with kimi-mlx, else the first one."""
        with_kimi_mlx = (python for python in self.interpreters if "kimi-mlx" in python.packages)
        return next(with_kimi_mlx, self.interpreters[0] if self.interpreters else None)


def facts_script(pythons: Sequence[str] = (), envs: Sequence[str] = (), *, is_search: bool = True) -> str:
    """Return the script that collects the facts.

    Args:
        pythons: absolute paths of interpreters to check first.
        envs: `NAME=value` variables of the hostfile, such as KIMI_MLX_STORES.
        is_search: whether to look for other interpreters too: the one of `--install`, then `python3`.
    """
    variables = {
        "facts_pythons": "\n".join(pythons),
        "facts_search": str(int(is_search)),
        "facts_interface_properties": INTERFACE_PROPERTIES,
        "facts_versions": source("cluster/hosts/versions.py"),
    }
    exports = "".join(f"export {shlex.quote(variable)}\n" for variable in envs)
    return exports + with_variables(variables, source("cluster/hosts/facts.sh"))


def with_variables(values: Mapping[str, str], script: str) -> str:
    """Return a shell script that sets variables (to any text without NUL), then runs `script`."""
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items()) + script


@cache
def source(name: str) -> str:
    """Return the text of a file of this package, to be sent to hosts."""
    return files("kimi_mlx").joinpath(name).read_text(encoding="utf-8")


def own_interpreter() -> Interpreter:
    """Return the interpreter that runs this process."""
    interpreter = parse_interpreter(json.dumps(describe(sys.executable)))
    assert interpreter is not None
    return interpreter


def parse_facts(host: str, text: str) -> Facts:
    """Parse complete or partial output of the script."""
    values = _values(text)

    def line_of(key: str) -> str | None:
        return values[key][0].strip() or None if key in values else None

    def lines_of(key: str) -> str | None:
        return "\n".join(values[key]) + "\n" if key in values else None

    meminfo = lines_of("meminfo") or ""
    free, wired = probes.vm_stat(lines_of("vm_stat") or "")
    return Facts(
        host=host,
        is_complete="complete" in values,
        hostname=line_of("hostname"),
        system=line_of("system"),
        machine=line_of("machine"),
        macos_version=line_of("macos_version"),
        macos_build=line_of("macos_build"),
        chip=line_of("chip"),
        memory_bytes=probes.number(line_of("memory_bytes")) or probes.meminfo(meminfo, "MemTotal"),
        free_bytes=free if free is not None else probes.meminfo(meminfo, "MemAvailable"),
        wired_bytes=wired,
        process_bytes=probes.process_memory(lines_of("top") or ""),
        wired_limit_mb=probes.number(line_of("wired_limit_mb")),
        home=line_of("home"),
        data_folder=line_of("data_folder"),
        stores_folder=line_of("stores_folder"),
        disk_free_bytes=probes.disk_free(line_of("disk") or ""),
        clock_start=probes.seconds(line_of("clock")),
        clock_end=probes.seconds(line_of("clock_end")),
        interpreters=_without_none(map(parse_interpreter, values.get("interpreter", ()))),
        broken_interpreters=tuple(values.get("broken_interpreter", ())),
        uv=line_of("uv"),
        stores=_without_none(map(_store, values.get("store", ()))),
        rdma_status=line_of("rdma_ctl"),
        rdma_ports=probes.rdma_ports(lines_of("ibv_devices"), lines_of("ibv_devinfo") or ""),
        firewall=probes.firewall(lines_of("firewall") or ""),
        ifconfig=lines_of("ifconfig"),
        hardware_ports=lines_of("hardware_ports"),
        thunderbolt=lines_of("thunderbolt"),
        ip_addr=lines_of("ip_addr"),
        interface_properties=lines_of("interface_properties"),
    )


def _values(text: str) -> dict[str, list[str]]:
    """Return key -> lines."""
    values: dict[str, list[str]] = {}
    for key, value in re.findall(r"^([a-z_]+)=(.*)$", text, re.MULTILINE):
        values.setdefault(key, []).append(value)
    return values


def _without_none(values: Iterable[T | None]) -> tuple[T, ...]:
    return tuple(value for value in values if value is not None)


def parse_interpreter(line: str) -> Interpreter | None:
    """Parse the output of kimi_mlx.cluster.hosts.versions; None if the line is something else."""
    try:
        fields = {str(key): str(value) for key, value in json.loads(line).items()}
        packages = {name: fields[name] for name in PACKAGES if name in fields}
        code, build = fields.get("code"), fields.get("mlx_build")
        return Interpreter(fields["path"], fields["python"], fields["machine"], packages, code, build)
    except (ValueError, KeyError, AttributeError):
        return None


def _store(line: str) -> HeldStore | None:
    """Parse a folder `owner--name/<commit>/<placement>/rank-<n>`, then repository and commit from the manifest.

    Repository and commit of the manifest take precedence over those of the folder's name.
    """
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
