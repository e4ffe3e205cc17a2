"""Check a hostfile before any rank is started."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence

from kimi_mlx.cluster.hosts.host import MESH_LIMIT, WIRE_LIMIT, Host, Hostfile, is_mesh, ring_wires
from kimi_mlx.cluster.hosts.launch import RING_VARIABLES
from kimi_mlx.errors import HostfileError

HOST_LIMIT = 64
"""Largest number of hosts in a hostfile; more is surely a mistake."""

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1"})
"""Names by which every host refers to itself."""

SHELL_CHARACTERS = frozenset("'`\"$\\;&<>|(){}, ")
"""Characters that OpenSSH refuses in a host name (a ProxyCommand passes it to a shell), or that separate a list."""

FIND_ADDRESSES = "find the addresses with `kimi-mlx launch --hosts a,b --save FILE`"
FIND_DEVICES = (
    "list the devices with `mlx.distributed_config --backend jaccl --hosts a,b`; names change after a restart"
)


def check_hostfile(hostfile: Hostfile, where: str) -> None:
    """Check a whole hostfile.

    Args:
        hostfile: hostfile to check.
        where: name of the hostfile in messages, such as its path in backticks.

    Raises:
        HostfileError: the hostfile is not valid.
    """
    check_names(hostfile.hosts, where)
    _check_addresses(hostfile.hosts, where)
    _check_duplicates(hostfile.hosts, where)
    _check_devices(hostfile.hosts, where)
    if len(hostfile.hosts) > 1:
        _check_backend(hostfile, where)
    check_envs(hostfile.envs, f"{where}: `envs`")


def check_names(hosts: Sequence[Host], where: str) -> None:
    """Check the number of hosts, and that each name is safe as an argument of `ssh`.

    Raises:
        HostfileError: there is no host, there are too many, or a name is not valid.
    """
    if not 1 <= len(hosts) <= HOST_LIMIT:
        raise HostfileError(f"{where} has {len(hosts)} hosts, but must have 1 to {HOST_LIMIT}")
    for rank, host in enumerate(hosts):
        name = host.ssh
        is_option = name.startswith("-") or "@-" in name
        if not name or is_option or not name.isprintable() or SHELL_CHARACTERS & set(name):
            raise HostfileError(
                f"{where}: host {rank} has the invalid name {name!r}",
                hint='write the name as you type it after `ssh`, such as "mac-b" or "me@mac-b.local"'
                if name
                else "remove the extra comma",
            )


def name_duplicate(hosts: Iterable[Host]) -> str | None:
    """Return the first name that repeats an earlier one, ignoring case."""
    return _first_duplicate(host.ssh for host in hosts)


def _check_addresses(hosts: Sequence[Host], where: str) -> None:
    addresses = [(rank, text) for rank, host in enumerate(hosts) for text in host.ips]
    for rank, text in addresses:
        _check_address(text, f"{where}: host {rank} (`{hosts[rank].ssh}`)")
    loopback = [text for _, text in addresses if _is_loopback(text)]
    if loopback and len(loopback) < len(addresses):
        other = next(text for _, text in addresses if not _is_loopback(text))
        raise HostfileError(
            f"{where} mixes the loopback address {loopback[0]} with {other}; other hosts cannot reach loopback",
            hint=FIND_ADDRESSES,
        )
    names = {"localhost" if host.ssh in LOCAL_NAMES else host.ssh.casefold() for host in hosts}
    if loopback and len(names) > 1:
        raise HostfileError(
            f"{where} has only loopback addresses for {len(names)} hosts, which cannot reach each other there",
            hint=FIND_ADDRESSES,
        )


def _check_address(text: str, host: str) -> None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise HostfileError(
            f"{host} has the invalid address {text!r}",
            hint='write addresses without a port or a prefix, such as "192.168.0.1"',
        ) from None
    if address.version == 6:
        raise HostfileError(
            f"{host} has the IPv6 address {text}, but MLX's ring and JACCL connect over IPv4 only",
            hint=FIND_ADDRESSES,
        )
    if address.is_unspecified or address.is_multicast or address == ipaddress.IPv4Address("255.255.255.255"):
        raise HostfileError(f"{host} has the address {text}, which cannot belong to a host", hint=FIND_ADDRESSES)


def _is_loopback(text: str) -> bool:
    return ipaddress.ip_address(text).is_loopback


def _check_duplicates(hosts: Sequence[Host], where: str) -> None:
    """Refuse repeated names and addresses, unless all addresses are loopback: then several ranks share this host."""
    addresses = [text for host in hosts for text in host.ips]
    if addresses and all(map(_is_loopback, addresses)):
        return
    if (name := name_duplicate(hosts)) is not None:
        raise HostfileError(
            f"{where} has `{name}` twice",
            hint="for several ranks on this machine, give each the address 127.0.0.1, as in hostfiles/two-local.json",
        )
    if (address := _first_duplicate(addresses)) is not None:
        raise HostfileError(f"{where} has the address {address} twice", hint=FIND_ADDRESSES)


def _first_duplicate(texts: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for text in texts:
        if text.casefold() in seen:
            return text
        seen.add(text.casefold())
    return None


def _check_devices(hosts: Sequence[Host], where: str) -> None:
    if not any(host.rdma for host in hosts):
        return
    count = len(hosts)
    for rank, host in enumerate(hosts):
        host_name = f"{where}: host {rank} (`{host.ssh}`)"
        if len(host.rdma) != count:
            raise HostfileError(
                f"{host_name} has {len(host.rdma)} entries in `rdma` for {count} hosts",
                hint="write one entry for each host, and `null` for the host itself",
            )
        if host.rdma[rank]:
            raise HostfileError(
                f"{host_name} has the device {host.rdma[rank][0]} to itself", hint=f"write `null` as its entry {rank}"
            )
        names = [name for devices in host.rdma for name in devices]
        for name in names:
            if not re.fullmatch(r"rdma_\w+", name, re.ASCII):
                raise HostfileError(
                    f"{host_name} has the device {name!r}; device names look like rdma_en5", hint=FIND_DEVICES
                )
        if (name := _first_duplicate(names)) is not None:
            raise HostfileError(f"{host_name} has {name} twice, but a port has only one cable", hint=FIND_DEVICES)
    for i in range(count):
        for j in range(i):
            forward, backward = len(hosts[i].rdma[j]), len(hosts[j].rdma[i])
            if forward != backward:
                raise HostfileError(
                    f"{where}: {forward} devices lead from host {i} (`{hosts[i].ssh}`) to host {j} (`{hosts[j].ssh}`), "
                    f"but {backward} lead back; each cable needs a device at both ends",
                    hint=FIND_DEVICES,
                )


def _check_backend(hostfile: Hostfile, where: str) -> None:
    hosts = hostfile.hosts
    rdma = [host.rdma for host in hosts]
    if hostfile.backend == "ring" or (hostfile.backend is None and not any(rdma)):
        _check_ring(hosts, where)
        return
    if not hosts[0].ips:
        raise HostfileError(
            f"{where}: host 0 (`{hosts[0].ssh}`) has no address; the other ranks need it to connect",
            hint=FIND_ADDRESSES,
        )
    if hostfile.backend is None:
        return
    if not any(rdma):
        raise HostfileError(f"{where} sets the backend {hostfile.backend} but has no `rdma` devices", hint=FIND_DEVICES)
    if hostfile.backend == "jaccl":
        _check_mesh(hosts, where)
    elif not 1 <= (wires := ring_wires(rdma)) <= WIRE_LIMIT:
        cables = f"{wires} cables" if wires else "no or different numbers of cables"
        raise HostfileError(
            f"{where} sets the backend jaccl-ring but has {cables} from each host to the next (last to first); "
            f"it must have 1 to {WIRE_LIMIT}",
            hint="list the hosts in the order of the cables",
        )


def _check_ring(hosts: Sequence[Host], where: str) -> None:
    for rank, host in enumerate(hosts):
        if not host.ips:
            raise HostfileError(f"{where}: host {rank} (`{host.ssh}`) has no address", hint=FIND_ADDRESSES)
        if len(host.ips) != len(hosts[0].ips):
            raise HostfileError(
                f"{where}: host {rank} (`{host.ssh}`) has {len(host.ips)} addresses but host 0 has "
                f"{len(hosts[0].ips)}; a ring needs the same number on each host",
                hint=FIND_ADDRESSES,
            )


def _check_mesh(hosts: Sequence[Host], where: str) -> None:
    if len(hosts) > MESH_LIMIT:
        raise HostfileError(
            f"{where} sets the backend jaccl for {len(hosts)} hosts; a mesh has at most {MESH_LIMIT}",
            hint='write `"backend": "jaccl-ring"`',
        )
    if not is_mesh([host.rdma for host in hosts]):
        i, j = next((i, j) for i in range(len(hosts)) for j in range(len(hosts)) if i != j and not hosts[i].rdma[j])
        raise HostfileError(
            f"{where} sets the backend jaccl, which needs a cable between every two hosts, but there is none between "
            f"host {i} (`{hosts[i].ssh}`) and host {j} (`{hosts[j].ssh}`)",
            hint='add the cable, or write `"backend": "jaccl-ring"` if the cables form a circle',
        )


def check_envs(envs: Sequence[str], where: str) -> None:
    """Check the environment variables of the ranks.

    Args:
        envs: variables as `NAME=value`.
        where: name of the list in messages.

    Raises:
        HostfileError: an entry is not `NAME=value`, has a control character, is reserved by MLX, or appears twice.
    """
    names: set[str] = set()
    for text in envs:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise HostfileError(
                f"{where} has {text!r}, which is not NAME=value",
                hint='write it as in "HF_ENDPOINT=https://example.org"',
            )
        if any(letter < " " for letter in value):
            raise HostfileError(f"{where}: the value of `{name}` has a control character")
        if name in RING_VARIABLES:
            raise HostfileError(f"{where} sets `{name}`, which the launcher sets for each rank", hint="remove it")
        if name in names:
            raise HostfileError(f"{where} sets `{name}` twice", hint="keep one of them")
        names.add(name)
