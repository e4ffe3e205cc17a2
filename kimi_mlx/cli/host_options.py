"""Options that name hosts, and what they come to."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from kimi_mlx.cluster.hosts.host import Backend, Host, Hostfile
from kimi_mlx.cluster.hosts.hostfile import parse_hosts, read_hostfile
from kimi_mlx.cluster.hosts.hostfile_check import check_hostfile
from kimi_mlx.errors import UsageError

BackendName = Literal["auto", "ring", "jaccl", "jaccl-ring"]

HostsOption = Annotated[
    str | None,
    typer.Option("--hosts", metavar="A,B", help="Names for ssh. Default: this machine alone.", show_default=False),
]
HostfileOption = Annotated[
    Path | None,
    typer.Option("--hostfile", metavar="FILE", help="Hosts and addresses in MLX's format.", show_default=False),
]
BackendOption = Annotated[
    BackendName,
    typer.Option("--backend", help="TCP (`ring`) or RDMA. `auto`: the hostfile's, else RDMA where all are ready."),
]
PythonOption = Annotated[
    str | None,
    typer.Option(
        "--python",
        metavar="PATH",
        help="The interpreter on every host. Default: one with kimi-mlx.",
        show_default=False,
    ),
]
SaveOption = Annotated[
    Path | None,
    typer.Option("--save", metavar="FILE", help="Write the addresses found as a hostfile.", show_default=False),
]
ForceLinkOption = Annotated[bool, typer.Option("--force-link", help="Use the network even if it is too slow.")]


def check_python_option(python: str | None) -> None:
    """Refuse a path that means another thing on each host."""
    if python is not None and not Path(python).is_absolute():
        raise UsageError(f"--python is `{python}`, no absolute path", hint="give one such as `/opt/py/bin/python3`")


def read_hosts(hosts: str | None, hostfile: Path | None, backend: Backend | None) -> tuple[Hostfile, str]:
    """The ranks, and the option that named them; none for this machine alone."""
    if hosts is not None and hostfile is not None:
        raise UsageError("--hosts and --hostfile exclude each other", hint="leave one of them out")
    if hosts is not None:
        return Hostfile(tuple(Host(host.ssh) for host in parse_hosts(hosts))), f"--hosts {hosts}"
    if hostfile is None:
        return Hostfile((Host("localhost"),)), ""
    ranks = read_hostfile(hostfile)
    if backend is not None:
        check_hostfile(replace(ranks, backend=backend), f"`{hostfile}` with `--backend {backend}`")
    return ranks, f"--hostfile {shlex.quote(str(hostfile))}"
