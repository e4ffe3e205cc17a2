"""`kimi-mlx service install`: check the options, write the service's file, and start the server."""

from __future__ import annotations

from typing import Annotated

import typer

from kimi_mlx.cli.host_options import HostOptions
from kimi_mlx.cli.launch import LaunchOptions
from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import DiskCacheOptions, JsonOption, RunOptions
from kimi_mlx.cli.serve import ServerOptions
from kimi_mlx.cli.service.options import DEFAULT_NAME, NameOption


@with_option_groups
def install(
    context: typer.Context,
    run: RunOptions,
    server: ServerOptions,
    disk: DiskCacheOptions,
    hosts: HostOptions,
    launch: LaunchOptions,
    name: NameOption = DEFAULT_NAME,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the file that would be written.")] = False,
    json: JsonOption = False,
) -> None:
    """Install a server, with the options of `serve`.

    It starts at once, at every login, and after a crash. With --hosts or --hostfile it runs on several Macs, as
    `kimi-mlx launch` does. Install again to change options: the running server is then replaced.
    """
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.output import print_json, stderr
    from kimi_mlx.cli.service.definition import check_port, define_service
    from kimi_mlx.cli.service.report import print_notes, report_to_dict, wait_until_up
    from kimi_mlx.services.choose import service_manager

    # the commands `serve` and `launch` parse the options again
    service, serving = define_service(context, name)
    manager = service_manager()
    if dry_run:
        if json:
            print_json({"path": str(manager.path(name)), "file": manager.render(service)})
        else:
            stderr.print(f"{manager.path(name)}:", style="dim", markup=False)
            print(manager.render(service), end="")
        return
    manager.check()
    current = manager.read(name) if manager.path(name).exists() and manager.state(name).is_running else None
    check_port(serving, current)
    service.log.parent.mkdir(parents=True, exist_ok=True)
    manager.install(service)
    if not json:
        stderr.print(f"written: {manager.path(name)}", markup=False)
    report = wait_until_up(manager, service, is_quiet=json)
    if json:
        print_json(report_to_dict(report))
    else:
        print_notes(report)
