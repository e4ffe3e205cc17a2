"""What can be wrong with a hostfile, found before anything is started."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence

from kimi_mlx.cluster.hosts.host import MESH_LIMIT, WIRE_LIMIT, Host, Hostfile, is_mesh, ring_wires
from kimi_mlx.cluster.hosts.launch import RING_VARIABLES
from kimi_mlx.errors import HostfileError

HOST_LIMIT = 64
"""Hosts in a hostfile; more is a mistake, not a cluster of Macs."""

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1"})
"""Names by which every host means itself."""

SHELL_CHARACTERS = frozenset("'`\"$\\;&<>|(){}, ")
"""What OpenSSH refuses in a host name too, since a ProxyCommand hands it to a shell; and what parts names in a list."""

FIND_ADDRESSES = "let them be found: `kimi-mlx launch --hosts a,b --save FILE`"
FIND_DEVICES = (
    "names change with the port and after a restart: `mlx.distributed_config --backend jaccl --hosts a,b` lists them"
)


def check_hostfile(hostfile: Hostfile, where: str) -> None:
    """Check all of it.

    Args:
        hostfile: what was read or made.
        where: what to call it in messages, such as its path in backticks.

    Raises:
        HostfileError: says what is wrong, where, and what to do.
    """
    check_names(hostfile.hosts, where)
    _check_addresses(hostfile.hosts, where)
    _check_duplicates(hostfile.hosts, where)
    _check_devices(hostfile.hosts, where)
    if len(hostfile.hosts) > 1:
        _check_backend(hostfile, where)
    check_envs(hostfile.envs, f"{where}: `envs`")


def check_names(hosts: Sequence[Host], where: str) -> None:
    """Check the number of hosts, and that `ssh` can be given each name as it is.

    Raises:
        HostfileError: too many, none, or a name that is none.
    """
    if not 1 <= len(hosts) <= HOST_LIMIT:
        raise HostfileError(f"{where} has {len(hosts)} hosts, 1 to {HOST_LIMIT} are possible")
    for rank, host in enumerate(hosts):
        name = host.ssh
        is_option = name.startswith("-") or "@-" in name
        if not name or is_option or not name.isprintable() or SHELL_CHARACTERS & set(name):
            raise HostfileError(
                f"{where}: host {rank} cannot be logged in to as {name!r}",
                hint='`ssh` must be a name as you type it after ssh, such as "mac-b" or "me@mac-b.local"'
                if name
                else "is there a comma too many?",
            )


def name_duplicate(hosts: Iterable[Host]) -> str | None:
    """The first name that was there before, whatever the case of its letters."""
    return _first_duplicate(host.ssh for host in hosts)


def _check_addresses(hosts: Sequence[Host], where: str) -> None:
    addresses = [(rank, text) for rank, host in enumerate(hosts) for text in host.ips]
    for rank, text in addresses:
        _check_address(text, f"{where}: host {rank} (`{hosts[rank].ssh}`)")
    loopback = [text for _, text in addresses if _is_loopback(text)]
    if loopback and len(loopback) < len(addresses):
        other = next(text for _, text in addresses if not _is_loopback(text))
        raise HostfileError(
            f"{where} mixes the loopback address {loopback[0]} with {other}; nobody else reaches the former",
            hint=FIND_ADDRESSES,
        )
    names = {"localhost" if host.ssh in LOCAL_NAMES else host.ssh.casefold() for host in hosts}
    if loopback and len(names) > 1:
        raise HostfileError(
            f"{where} has loopback addresses only, but {len(names)} different hosts; they would not reach each other",
            hint=FIND_ADDRESSES,
        )


def _check_address(text: str, whose: str) -> None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise HostfileError(
            f"{whose} has the address {text!r}, which is none",
            hint='`ips` holds addresses without port or prefix, such as "192.168.0.1"',
        ) from None
    if address.version == 6:
        raise HostfileError(
            f"{whose} has the IPv6 address {text}, but MLX's ring and JACCL connect over IPv4 only",
            hint=FIND_ADDRESSES,
        )
    if address.is_unspecified or address.is_multicast or address == ipaddress.IPv4Address("255.255.255.255"):
        raise HostfileError(f"{whose} has the address {text}, which no host can be reached at", hint=FIND_ADDRESSES)


def _is_loopback(text: str) -> bool:
    return ipaddress.ip_address(text).is_loopback


def _check_duplicates(hosts: Sequence[Host], where: str) -> None:
    """Several ranks on a host are told by loopback addresses: all of them, as `_check_addresses` has seen to."""
    addresses = [text for host in hosts for text in host.ips]
    if addresses and all(map(_is_loopback, addresses)):
        return
    if (name := name_duplicate(hosts)) is not None:
        raise HostfileError(
            f"{where} has `{name}` twice",
            hint="for several ranks on one host give each the address 127.0.0.1, as in hostfiles/two-local.json",
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
        whose = f"{where}: host {rank} (`{host.ssh}`)"
        if len(host.rdma) != count:
            raise HostfileError(
                f"{whose} has {len(host.rdma)} entries in `rdma` for {count} hosts",
                hint="every host needs one entry for each host, `null` for itself",
            )
        if host.rdma[rank]:
            raise HostfileError(
                f"{whose} has the device {host.rdma[rank][0]} to itself", hint=f"write `null` as its entry {rank}"
            )
        names = [name for devices in host.rdma for name in devices]
        for name in names:
            if not re.fullmatch(r"rdma_\w+", name, re.ASCII):
                raise HostfileError(f"{whose} has the device {name!r}; they are called rdma_en5", hint=FIND_DEVICES)
        if (name := _first_duplicate(names)) is not None:
            raise HostfileError(f"{whose} has {name} twice; one port has one cable", hint=FIND_DEVICES)
    for i in range(count):
        for j in range(i):
            one, other = len(hosts[i].rdma[j]), len(hosts[j].rdma[i])
            if one != other:
                raise HostfileError(
                    f"{where}: {one} devices lead from host {i} (`{hosts[i].ssh}`) to host {j} (`{hosts[j].ssh}`), "
                    f"but {other} back; a cable has two ends",
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
            f"{where}: host 0 (`{hosts[0].ssh}`) has no address, at which the others find it", hint=FIND_ADDRESSES
        )
    if hostfile.backend is None:
        return
    if not any(rdma):
        raise HostfileError(f"{where} asks for {hostfile.backend} but has no `rdma` devices", hint=FIND_DEVICES)
    if hostfile.backend == "jaccl":
        _check_mesh(hosts, where)
    elif not 1 <= (wires := ring_wires(rdma)) <= WIRE_LIMIT:
        found = f"{wires} cables" if wires else "no or different numbers of cables"
        raise HostfileError(
            f"{where} asks for jaccl-ring but has {found} from each host to the next and the last to the first; "
            f"1 to {WIRE_LIMIT} are possible",
            hint="put the hosts in the order of the cables",
        )


def _check_ring(hosts: Sequence[Host], where: str) -> None:
    for rank, host in enumerate(hosts):
        if not host.ips:
            raise HostfileError(f"{where}: host {rank} (`{host.ssh}`) has no address", hint=FIND_ADDRESSES)
        if len(host.ips) != len(hosts[0].ips):
            raise HostfileError(
                f"{where}: host {rank} (`{host.ssh}`) has {len(host.ips)} addresses but host 0 has "
                f"{len(hosts[0].ips)}; a ring needs the same number everywhere",
                hint=FIND_ADDRESSES,
            )


def _check_mesh(hosts: Sequence[Host], where: str) -> None:
    if len(hosts) > MESH_LIMIT:
        raise HostfileError(
            f"{where} asks for jaccl with {len(hosts)} hosts; a mesh has {MESH_LIMIT} at most",
            hint='write `"backend": "jaccl-ring"`',
        )
    if not is_mesh([host.rdma for host in hosts]):
        i, j = next((i, j) for i in range(len(hosts)) for j in range(len(hosts)) if i != j and not hosts[i].rdma[j])
        raise HostfileError(
            f"{where} asks for jaccl, which needs a cable between every two hosts, but there is none between "
            f"host {i} (`{hosts[i].ssh}`) and host {j} (`{hosts[j].ssh}`)",
            hint='add the cable, or write `"backend": "jaccl-ring"` if the cables form a circle',
        )


def check_envs(envs: Sequence[str], where: str) -> None:
    """Check variables for the ranks.

    Args:
        envs: `NAME=value`.
        where: what to call them in messages.

    Raises:
        HostfileError: something else, a control character, one of MLX's own, or one twice.
    """
    names: set[str] = set()
    for text in envs:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise HostfileError(
                f"{where} has {text!r}, which is not NAME=value", hint='write it like "HF_ENDPOINT=https://example.org"'
            )
        if any(letter < " " for letter in value):
            raise HostfileError(f"{where}: the value of `{name}` has a control character")
        if name in RING_VARIABLES:
            raise HostfileError(
                f"{where} sets `{name}`, but it differs by rank and is set at the start", hint="remove it"
            )
        if name in names:
            raise HostfileError(f"{where} sets `{name}` twice", hint="keep one of them")
        names.add(name)
