"""Read, check and write MLX's hostfile, a JSON file.

Two forms: a list of hosts, or an object with `hosts`, `backend` and `envs`. A host has `ssh`, `ips` and `rdma`.
Unlike MLX, we refuse unknown keys, so that a misspelled setting is not silently ignored.
Source: Hostfile.from_file of mlx 0.32, python/mlx/_distributed_utils/common.py.
"""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import cast

from kimi_mlx.cluster.hosts.host import Backend, Devices, Host, Hostfile
from kimi_mlx.cluster.hosts.hostfile_check import check_hostfile, check_names, name_duplicate
from kimi_mlx.errors import HostfileError
from kimi_mlx.files import write_atomically

FILE_LIMIT_BYTES = 1 << 20
"""Size limit; a larger file is not a hostfile."""

BACKENDS: dict[object, Backend | None] = {
    "ring": "ring",
    "jaccl": "jaccl",
    "jaccl-ring": "jaccl-ring",
    "": None,
    None: None,
}

SHAPE_HINT = 'write a host as {"ssh": "mac-a", "ips": ["192.168.0.1"]}; see the examples in hostfiles/'


def read_hostfile(path: Path) -> Hostfile:
    """Read and check a hostfile.

    Raises:
        HostfileError: the file cannot be read, is not JSON, or is not valid.
    """
    where = f"`{path}`"
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise HostfileError(
            f"{where} cannot be read: {error.strerror}", hint="give an existing file, or name the hosts: `--hosts a,b`"
        ) from error
    if len(data) > FILE_LIMIT_BYTES:
        raise HostfileError(
            f"{where} is larger than {FILE_LIMIT_BYTES} bytes, so it is not a hostfile", hint=SHAPE_HINT
        )
    try:
        value = json.loads(data, object_pairs_hook=_object_once)
    except (ValueError, RecursionError) as error:
        raise HostfileError(f"{where} is not JSON: {error}", hint=SHAPE_HINT) from error
    return parse_hostfile(value, where)


def parse_hostfile(value: object, where: str) -> Hostfile:
    """Parse and check the decoded JSON of a hostfile.

    Args:
        value: decoded JSON of either form.
        where: name of the file in messages, such as its path in backticks.

    Raises:
        HostfileError: the hostfile is not valid.
    """
    document = {"hosts": cast("list[object]", value)} if isinstance(value, list) else value
    fields = _fields(document, where, required={"hosts"}, optional={"backend", "envs"})
    backend = fields.get("backend")
    if not isinstance(backend, str | None) or backend not in BACKENDS:
        known = ", ".join(f"`{name}`" for name in BACKENDS if name)
        raise HostfileError(f"{where} has the unknown backend {backend!r}", hint=f"write {known}, or leave it out")
    hostfile = Hostfile(
        hosts=tuple(_host(host, f"{where}: host {rank}") for rank, host in enumerate(_list(fields["hosts"], where))),
        backend=BACKENDS[backend],
        envs=_texts(fields.get("envs", []), f"{where}: `envs`"),
    )
    check_hostfile(hostfile, where)
    return hostfile


def parse_hosts(text: str, where: str = "`--hosts`") -> tuple[Host, ...]:
    """Parse a list such as `mac-a,me@mac-b`. As with mlx.launch, a host named by its address also gets that address.

    Raises:
        HostfileError: a name is not valid, or appears twice.
    """
    hosts = tuple(Host(ssh=name.strip(), ips=_addresses_in(name.strip())) for name in text.split(","))
    check_names(hosts, where)
    if (name := name_duplicate(hosts)) is not None:
        raise HostfileError(f"{where} has `{name}` twice", hint="for several ranks on this machine: `--ranks 2`")
    return hosts


def to_json(hostfile: Hostfile) -> str:
    """Return the text of the file: the object form, with one line per host; MLX reads it too."""
    head = {"backend": hostfile.backend, "envs": list(hostfile.envs)}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items() if value]
    hosts = ",\n".join(f"    {json.dumps(_host_value(host))}" for host in hostfile.hosts)
    return "{\n" + "".join(lines) + f'  "hosts": [\n{hosts}\n  ]\n' + "}\n"


def write_hostfile(path: Path, hostfile: Hostfile) -> None:
    """Write the file atomically.

    Raises:
        HostfileError: the file cannot be written.
    """
    try:
        write_atomically(path, to_json(hostfile).encode())
    except OSError as error:
        raise HostfileError(f"`{path}` cannot be written: {error.strerror}", hint="give another path") from error


def devices_value(devices: Devices) -> str | list[str] | None:
    """Return devices in MLX's form: null, a name, or a list of names."""
    if len(devices) > 1:
        return list(devices)
    return devices[0] if devices else None


def _host_value(host: Host) -> dict[str, object]:
    value: dict[str, object] = {"ssh": host.ssh, "ips": list(host.ips)}
    return {**value, "rdma": [devices_value(devices) for devices in host.rdma]} if host.rdma else value


def _host(value: object, where: str) -> Host:
    fields = _fields(value, where, required={"ssh"}, optional={"ips", "rdma"})
    if not isinstance(fields["ssh"], str):
        raise HostfileError(f"{where}: `ssh` must be a string, not {fields['ssh']!r}", hint=SHAPE_HINT)
    rdma = _list(fields.get("rdma", []), f"{where}: `rdma`")
    return Host(
        ssh=fields["ssh"],
        ips=_texts(fields.get("ips", []), f"{where}: `ips`"),
        rdma=tuple(_devices(entry, f"{where}: entry {peer} of `rdma`") for peer, entry in enumerate(rdma)),
    )


def _devices(value: object, where: str) -> Devices:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else _texts(value, where)


def _texts(value: object, where: str) -> tuple[str, ...]:
    texts = _list(value, where)
    for text in texts:
        if not isinstance(text, str):
            raise HostfileError(f"{where} contains {text!r}, which is not a string", hint=SHAPE_HINT)
    return tuple(cast("list[str]", texts))


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise HostfileError(f"{where} must be a list, not {_type(value)}", hint=SHAPE_HINT)
    return cast("list[object]", value)


def _fields(value: object, where: str, required: set[str], optional: set[str]) -> dict[str, object]:
    if not isinstance(value, dict):
        raise HostfileError(f"{where} must be an object, not {_type(value)}", hint=SHAPE_HINT)
    fields = cast("dict[str, object]", value)
    if missing := required - fields.keys():
        raise HostfileError(f"{where} lacks {_quoted(missing)}", hint=SHAPE_HINT)
    if unknown := fields.keys() - required - optional:
        raise HostfileError(
            f"{where} has the unknown key {_quoted(unknown)}", hint=f"the known keys are {_quoted(required | optional)}"
        )
    return fields


def _quoted(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _type(value: object) -> str:
    names = {"dict": "an object", "list": "a list", "str": "a string", "bool": "a boolean", "NoneType": "null"}
    return names.get(type(value).__name__, "a number")


def _object_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"an object has a key twice: {', '.join(name for name, _ in pairs)}")
    return fields


def _addresses_in(name: str) -> tuple[str, ...]:
    try:
        return (str(ipaddress.IPv4Address(name)),)
    except ValueError:
        return ()
