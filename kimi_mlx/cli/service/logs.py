"""`kimi-mlx service logs`: what the server of a service has printed."""

from __future__ import annotations

from typing import Annotated

import typer

from kimi_mlx.cli.service.options import DEFAULT_NAME, NameOption


def logs(
    name: NameOption = DEFAULT_NAME,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Also print new lines as they come, until Ctrl-C.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Number of last lines.")] = 100,
) -> None:
    """Print the log of the server."""
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.output import escape_controls
    from kimi_mlx.cli.service.options import find_service
    from kimi_mlx.services import log_file

    _, service = find_service(name)
    output = log_file.follow(service.log, lines) if follow else log_file.last_lines(service.log, lines)
    for line in output:
        print(escape_controls(line), flush=follow)
