"""Options that name hosts, and the hosts that they name."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from kimi_mlx.cli.options import ADVANCED, CLUSTER
from kimi_mlx.cluster.hosts.host import Backend, Host, Hostfile
from kimi_mlx.cluster.hosts.hostfile import parse_hosts, read_hostfile
from kimi_mlx.cluster.hosts.hostfile_check import check_hostfile
from kimi_mlx.errors import UsageError

BackendName = Literal["auto", "ring", "jaccl", "jaccl-ring"]

HostfileOption = Annotated[
    Path | None,
    typer.Option(
        "--hostfile",
        metavar="FILE",
        help="Hosts and their addresses, in MLX's format.",
        show_default=False,
        rich_help_panel=CLUSTER,
    ),
]

EnvOption = Annotated[
    list[str] | None,
    typer.Option(
        "--env",
        metavar="NAME=VALUE",
        help="Set an environment variable for every rank; repeatable.",
        show_default=False,
        rich_help_panel=CLUSTER,
    ),
]


@dataclass(frozen=True)
class HostOptions:
    """Options that name hosts and the network between them."""

    hosts: Annotated[
        str | None,
        typer.Option(
            "--hosts",
            metavar="A,B",
            help="SSH names of the hosts; each runs one rank.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None
    hostfile: HostfileOption = None
    backend: Annotated[
        BackendName,
        typer.Option(
            "--backend",
            help="TCP (`ring`) or RDMA (`jaccl`). `auto`: the hostfile's, else RDMA if all hosts are ready for it.",
            rich_help_panel=CLUSTER,
        ),
    ] = "auto"
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="FILE",
            help="Write the hosts and the addresses found to a hostfile.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None
    force_link: Annotated[
        bool,
        typer.Option("--force-link", help="Use the network even if it is too slow.", rich_help_panel=ADVANCED),
    ] = False
    python: Annotated[
        str | None,
        typer.Option(
            "--python",
            metavar="PATH",
            help="Python interpreter on every host. Default: one that has kimi-mlx.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = None

    @property
    def requested_backend(self) -> Backend | None:
        """The backend; None to choose one."""
        return None if self.backend == "auto" else self.backend

    def read(self) -> tuple[Hostfile, str]:
        """Return the ranks and the option that named them; see read_hosts().

        Raises:
            UsageError: options that exclude each other, or a `--python` that is not an absolute path.
            HostfileError: the hostfile is broken.
        """
        if self.python is not None and not Path(self.python).is_absolute():
            raise UsageError(
                f"--python `{self.python}` is not an absolute path", hint="use a path such as `/opt/py/bin/python3`"
            )
        return read_hosts(self.hosts, self.hostfile, self.requested_backend)


def read_hosts(hosts: str | None, hostfile: Path | None, backend: Backend | None) -> tuple[Hostfile, str]:
    """Return the ranks and the option that named them, for hints.

    Args:
        hosts: value of `--hosts`.
        hostfile: value of `--hostfile`. Without both there is one rank, on this machine, and the option is empty.
        backend: backend that the hostfile must support; None for any.

    Raises:
        UsageError: both options are given.
        HostfileError: the hostfile is broken, or lacks what the backend needs.
    """
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
