"""`kimi-mlx service status`: the installed services and the health of their servers."""

from __future__ import annotations

from typing import Annotated

import typer

from kimi_mlx.cli.options import JsonOption


def status(
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Name of one service. Default: all.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show whether the server runs and answers.

    The exit code is 1 if a service is not up.
    """
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.output import print_json, stdout
    from kimi_mlx.cli.service.options import find_service, missing_service
    from kimi_mlx.cli.service.report import make_report, print_report, report_to_dict
    from kimi_mlx.services.choose import service_manager

    names = service_manager().names() if name is None else [name]
    if not names:
        raise missing_service("", [])
    reports = [make_report(*find_service(each)) for each in names]
    if json:
        documents = [report_to_dict(report) for report in reports]
        print_json(documents if name is None else documents[0])
    else:
        for number, report in enumerate(reports):
            if number:
                stdout.print()
            print_report(report)
    if not all(report.is_up for report in reports):
        raise typer.Exit(1)
