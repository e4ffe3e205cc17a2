"""`kimi-mlx serve`: a model for programs, over HTTP."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import SERVER, DiskCacheOptions, RunOptions, ToolArgumentsOption, refuse_mlx_launch
from kimi_mlx.errors import UsageError
from kimi_mlx.units import MB

if TYPE_CHECKING:
    from kimi_mlx.server.server import ServingOptions


@dataclass(frozen=True)
class ServerOptions:
    """Options of the HTTP server."""

    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="Address to listen on. Other addresses than this machine's own need an API key.",
            rich_help_panel=SERVER,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 picks a free one.", rich_help_panel=SERVER),
    ] = 8080
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help="API key that clients must send; repeatable. Prefer $KIMI_MLX_API_KEY or a file: other users of this "
            "machine can see command-line arguments.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            help="File with one API key per line; `#` starts a comment.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="Additional host name that requests may use; repeatable.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            metavar="ORIGIN",
            help="Allow browser requests from pages of this origin, e.g. `https://example.org`; repeatable.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None
    served_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-name",
            metavar="NAME",
            help="Additional model name for clients; repeatable.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None
    max_queue: Annotated[
        int,
        typer.Option(
            "--max-queue",
            min=1,
            help="Maximum number of waiting requests; further ones get status 429.",
            rich_help_panel=SERVER,
        ),
    ] = 1024
    max_wait: Annotated[
        int,
        typer.Option(
            "--max-wait",
            min=1,
            metavar="SECONDS",
            help="Longest time that a request waits; then it gets status 429.",
            rich_help_panel=SERVER,
        ),
    ] = 600
    max_body: Annotated[
        int,
        typer.Option("--max-body", min=1, metavar="MB", help="Maximum request body.", rich_help_panel=SERVER),
    ] = 64
    keep_responses: Annotated[
        int,
        typer.Option(
            "--keep-responses",
            min=0,
            metavar="N",
            help="Maximum number of responses in memory, for `previous_response_id` of the Responses API; 0: none.",
            rich_help_panel=SERVER,
        ),
    ] = 256
    allow_image_urls: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-image-urls",
            metavar="HOST,...",
            help="Hosts from which images may be fetched that requests name by URL; by default none. Private addresses "
            "are never used.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None
    tool_arguments: ToolArgumentsOption = "schema"
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log the request bodies.", rich_help_panel=SERVER)
    ] = False
    no_page: Annotated[
        bool, typer.Option("--no-page", help="Do not serve the web page at `/`.", rich_help_panel=SERVER)
    ] = False

    def serving(self) -> ServingOptions:
        """Return the options for the server, with the API keys.

        Raises:
            UsageError: an option is wrong, or other machines could use the server without a key.
        """
        from kimi_mlx.cli.api_keys import KEY_HINT, read_keys
        from kimi_mlx.server.http.security import Security, is_loopback
        from kimi_mlx.server.remote_images import normalize_host
        from kimi_mlx.server.server import ServingOptions

        keys = read_keys(self.api_key or (), self.api_key_file)
        if not keys and not is_loopback(self.host):
            raise UsageError(f"refusing to listen on `{self.host}` without an API key", hint=KEY_HINT)
        security = Security(self.host, keys, tuple(self.allow_host or ()), tuple(self.cors_origin or ()))
        named_hosts = ",".join(self.allow_image_urls or ()).split(",")
        image_hosts = tuple(normalize_host(host.strip()) for host in named_hosts if host.strip())
        return ServingOptions(
            security,
            self.max_queue,
            self.max_wait,
            self.max_body * MB,
            image_hosts,
            self.log_prompts,
            keep_responses=self.keep_responses,
            has_page=not self.no_page,
            starts_worker=True,
            constrains_arguments=self.tool_arguments == "schema",
        )


@with_option_groups
def serve(context: typer.Context, run: RunOptions, server: ServerOptions, disk: DiskCacheOptions) -> None:
    """Serve a model over HTTP (OpenAI, Anthropic APIs).

    By default it listens on this machine only.
    """
    refuse_mlx_launch()
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.http_server import greet, key_placeholder, make_server, start_log
    from kimi_mlx.cli.local_checks import with_local_checks
    from kimi_mlx.cli.local_server import local_server
    from kimi_mlx.cli.open_model import launch_context, open_session, prepare_model, session_options
    from kimi_mlx.cli.output import closing_with_status, stderr
    from kimi_mlx.client.local_servers import announce
    from kimi_mlx.server.http.server_socket import ServerSocket
    from kimi_mlx.store.model_ref import resolve_model_name

    target = resolve_model_name(run.model_name)
    serving = server.serving()
    options = session_options(run, disk)
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # worker processes must not import modules of the current folder
    with ExitStack() as stack:
        server_socket = stack.enter_context(closing(ServerSocket(server.host, server.port)))  # before loading
        prepared = prepare_model(launch_context(context), target, run, is_quiet=False)
        opened = open_session(prepared, options, run.ranks, is_quiet=False)
        stack.enter_context(closing_with_status(opened.session))
        opened = with_local_checks(opened, prepared, run.ranks, disk.cache_dir, options.expert_memory)
        key = key_placeholder(serving.security.keys)
        on_ready = partial(greet, target.name, server_socket, key, has_page=serving.has_page)
        http_server = make_server(target, opened, server.served_name or (), serving, on_ready)
        start_log()
        server_socket.listen()
        try:
            with announce(local_server(target, opened, server_socket.url, needs_key=bool(serving.security.keys))):
                http_server.run([server_socket.socket])
        finally:
            if http_server.started:
                stderr.print("stopped")
