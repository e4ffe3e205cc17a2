"""`kimi-mlx status`: the state of a running server and its hosts, and problems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kimi_mlx.cli.options import JsonOption


def status(
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL]",
            help="Address of a server, such as `http://mac-a:8080`. Default: yours on this machine.",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="File with the server's API key. Default: $KIMI_MLX_API_KEY.",
            show_default=False,
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Update every second, until Ctrl-C.")] = False,
    json: JsonOption = False,
) -> None:
    """Show the state of a server and its hosts.

    The web page and GET /v1/cluster have the same facts. With --json and --watch, one line a second.
    """
    from kimi_mlx.cli.server_status import print_status, watch_status  # HTTP: not for `--help`

    (watch_status if watch else print_status)(url, api_key_file, is_json=json)
