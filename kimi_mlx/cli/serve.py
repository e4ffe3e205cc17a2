"""`kimi-mlx serve`: a model for programs, over HTTP."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import SERVER, DiskCacheOptions, RunOptions, refuse_mlx_launch
from kimi_mlx.cli.output import stderr
from kimi_mlx.errors import UsageError
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.session import Session
from kimi_mlx.settings import Settings
from kimi_mlx.units import MB

if TYPE_CHECKING:  # imported by serve() itself: the server's libraries are heavy
    from kimi_mlx.server.http.server_socket import ServerSocket
    from kimi_mlx.server.server import Server, ServingOptions
    from kimi_mlx.store.model_ref import ModelRef

COMMENT = re.compile(r"(^|\s)#.*")
"""A comment in a file of keys; a key may contain a `#`."""

FILE_HINT = "write one key per line: `openssl rand -hex 24 > FILE` creates one"
KEY_HINT = "set one: `export KIMI_MLX_API_KEY=$(openssl rand -hex 24)`; clients send it as their API key"


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
    ] = 64
    max_body: Annotated[
        int,
        typer.Option("--max-body", min=1, metavar="MB", help="Maximum request body.", rich_help_panel=SERVER),
    ] = 32
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log the request bodies.", rich_help_panel=SERVER)
    ] = False


@with_option_groups
def serve(context: typer.Context, run: RunOptions, server: ServerOptions, disk: DiskCacheOptions) -> None:
    """Serve a model over HTTP (OpenAI, Anthropic APIs).

    By default it listens on this machine only.
    """
    # heavy imports: not for a usage error
    from kimi_mlx.cli.open_model import launch_context, open_session, prepare_model, session_options
    from kimi_mlx.store.model_ref import resolve_model_name

    refuse_mlx_launch()
    target = resolve_model_name(run.model_name)
    keys = _read_keys(server.api_key or (), server.api_key_file)
    # the server's libraries are heavy: not for `serve --help`
    from kimi_mlx.server.http.security import Security, is_loopback
    from kimi_mlx.server.http.server_socket import ServerSocket
    from kimi_mlx.server.server import ServingOptions

    if not keys and not is_loopback(server.host):
        raise UsageError(f"refusing to listen on `{server.host}` without an API key", hint=KEY_HINT)
    security = Security(server.host, keys, tuple(server.allow_host or ()), tuple(server.cors_origin or ()))
    serving = ServingOptions(security, server.max_queue, server.max_body * MB, server.log_prompts)
    options = session_options(run, disk, has_sampling=True)
    with ExitStack() as stack:
        server_socket = stack.enter_context(closing(ServerSocket(server.host, server.port)))  # before loading
        prepared = prepare_model(launch_context(context), target, run, is_quiet=False)
        opened = open_session(prepared, options, run.ranks, is_quiet=False)
        session = stack.enter_context(closing(opened.session))
        greet = partial(_greet, target.name, server_socket, _key_as_typed(keys))
        http_server = _server(target, session, opened.tokenizer_folder, server.served_name or (), serving, greet)
        _log()
        server_socket.listen()
        http_server.run([server_socket.socket])


def _read_keys(options: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Return all API keys: of the options, the environment and a file.

    Raises:
        UsageError: the file has no keys, or a key cannot be sent in a header.
    """
    own = Settings.from_environment().api_key
    keys = [("--api-key", key) for key in options] + ([("$KIMI_MLX_API_KEY", own)] if own else [])
    if file is not None:
        keys += _keys_in(file)
    for source, key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            message = f"{source}: an API key consists of printable ASCII characters without spaces"
            raise UsageError(message, hint=KEY_HINT)
    return tuple(dict.fromkeys(key for _, key in keys))


def _keys_in(file: Path) -> list[tuple[str, str]]:
    """Return the keys in a file, each with its position."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"cannot read `{file}`: there is no such file", hint=FILE_HINT) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read `{file}`: it is not UTF-8 text", hint=FILE_HINT) from error
    except OSError as error:
        raise UsageError(f"cannot read `{file}`: {error.strerror}", hint=FILE_HINT) from error
    lines = [COMMENT.sub("", line).strip() for line in text.splitlines()]
    keys = [(f"`{file}`, line {number}", line) for number, line in enumerate(lines, 1) if line]
    if not keys:
        raise UsageError(f"`{file}` has no key", hint=FILE_HINT)
    return keys


def _server(
    target: ModelRef,
    session: Session,
    folder: Path,
    names: Sequence[str],
    options: ServingOptions,
    greet: Callable[[ChatTokenizer], None],
) -> Server:
    """Return the server of a loaded model."""
    from kimi_mlx.server.model_info import ModelInfo
    from kimi_mlx.server.server import Server

    entry = target.entry
    own = [target.name if target.folder is None or entry else folder.resolve().name]
    if entry is not None:
        own += [name for name in (entry.alias, entry.repository, entry.original_repository) if name is not None]
    own += [name.partition("/")[2] for name in own if "/" in name]
    name, *aliases = dict.fromkeys([*names, *own])
    model_info = ModelInfo(name, aliases, load_config(folder).max_position_embeddings, int(time.time()))
    instant = entry.instant_sampling if entry is not None else None
    tokenizer = ChatTokenizer.load(folder, defaults=entry.default_sampling() if entry else None)
    sampling = instant.recommended() if instant else {}
    return Server(session, tokenizer, model_info, sampling, options, partial(greet, tokenizer))


def _log() -> None:
    """Send the server's log to stderr, one line per request."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name, level in (("kimi_mlx", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)


def _key_as_typed(keys: Sequence[str]) -> str | None:
    """Return the key as the example command shows it: never the key itself, others may see the terminal."""
    if not keys:
        return None
    return "$KIMI_MLX_API_KEY" if Settings.from_environment().api_key in keys else "KEY"


def _greet(name: str, server_socket: ServerSocket, key: str | None, tokenizer: ChatTokenizer) -> None:
    """Print the URL, and a command to try."""
    stderr.print(f"{name} is ready at {server_socket.url}/v1 (Ctrl-C stops the server)", markup=False)
    if others := server_socket.other_urls:
        stderr.print(f"from other machines: {', '.join(f'{url}/v1' for url in others)}", markup=False)
    header = "" if key is None else f' -H "Authorization: Bearer {key}"'
    if tokenizer.has_chat_template and tokenizer.has_tokenizer:
        path, body = "chat/completions", '{"messages": [{"role": "user", "content": "Hello"}]}'
    elif tokenizer.has_tokenizer:
        path, body = "completions", '{"prompt": "Once upon a time", "max_tokens": 20}'
    else:
        path, body = "completions", '{"prompt": [1, 2, 3], "max_tokens": 20}'
    stderr.print(f"try: curl {server_socket.url}/v1/{path}{header} -d '{body}'", style="dim", markup=False)
