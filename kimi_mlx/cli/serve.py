"""`kimi-mlx serve`: a model for programs, over HTTP."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mlx.cli.fetch_model import fetch_model
from kimi_mlx.cli.open_model import LaunchContext, launch_context, open_on_hosts, open_on_this_machine
from kimi_mlx.cli.options import (
    CacheDirOption,
    CacheDiskOption,
    CacheMemoryOption,
    CheckEveryOption,
    DtypeOption,
    FastSyncOption,
    ModelArgument,
    RanksOption,
    SpeculateOption,
    StrategyOption,
    refuse_mlx_launch,
)
from kimi_mlx.cli.output import stderr
from kimi_mlx.cli.placement import choose_placement, print_placement
from kimi_mlx.errors import UsageError
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.session import DEFAULT_CACHE_DISK_BYTES, Session, SessionOptions
from kimi_mlx.settings import Settings
from kimi_mlx.store.locate import Target, understand
from kimi_mlx.units import MB

if TYPE_CHECKING:  # the server's libraries are not for other commands' starts
    from kimi_mlx.server.http.server_socket import ServerSocket
    from kimi_mlx.server.server import Server, ServingOptions

COMMENT = re.compile(r"(^|\s)#.*")
"""In a file of keys; a key may have a `#` inside."""

FILE_HINT = "write a key a line into it: `openssl rand -hex 24 > FILE` makes one"
KEY_HINT = "`export KIMI_MLX_API_KEY=$(openssl rand -hex 24)` makes one; clients send it as their API key"


def serve(
    context: typer.Context,
    model: ModelArgument = None,
    host: Annotated[
        str, typer.Option("--host", help="The address to listen on; other than this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0 takes any.")] = 8080,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help="What clients must send; may be given again. Better in $KIMI_MLX_API_KEY or a file: others on this "
            "machine see a command's words.",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="Keys, one a line; `#` begins a comment.", show_default=False)
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="A further name that the server may be called by; may be given again.",
            show_default=False,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            metavar="ORIGIN",
            help="Let pages of this origin (`https://example.org`) ask from a browser; may be given again.",
            show_default=False,
        ),
    ] = None,
    served_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-name",
            metavar="NAME",
            help="What clients call the model, beside its own names; may be given again.",
            show_default=False,
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=1, help="Answers that may wait; more are refused for now (429).")
    ] = 64,
    max_body: Annotated[int, typer.Option("--max-body", min=1, metavar="MB", help="Of a request.")] = 32,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Show requests' bodies in the log.")] = False,
    ranks: RanksOption = 1,
    strategy: StrategyOption = None,
    speculate: SpeculateOption = 0,
    check_every: CheckEveryOption = 0,
    dtype: DtypeOption = None,
    cache_memory: CacheMemoryOption = None,
    cache_dir: CacheDirOption = None,
    cache_disk: CacheDiskOption = DEFAULT_CACHE_DISK_BYTES,
    fast_sync: FastSyncOption = False,
) -> None:
    """Serve a model to programs: OpenAI's and Anthropic's APIs over HTTP, on this machine unless told otherwise."""
    refuse_mlx_launch()
    target = understand(model or Settings.from_environment().model)
    keys = _keys(api_key or (), api_key_file)
    from kimi_mlx.server.http.security import Security, is_loopback
    from kimi_mlx.server.http.server_socket import ServerSocket
    from kimi_mlx.server.server import ServingOptions

    if not keys and not is_loopback(host):
        raise UsageError(f"whoever reaches `{host}` could use the model: other machines need a key", hint=KEY_HINT)
    if cache_dir is None and cache_disk != DEFAULT_CACHE_DISK_BYTES:
        raise UsageError("`--cache-disk` limits a folder, and none is named", hint="add --cache-dir DIR")
    security = Security(host, keys, tuple(allow_host or ()), tuple(cors_origin or ()))
    options = ServingOptions(security, max_queue, max_body * MB, log_prompts)
    wanted = SessionOptions(
        None,
        dtype=dtype,
        has_sampling=True,
        speculate=speculate,
        check_every=check_every,
        fast_sync=fast_sync,
        cache_dir=cache_dir,
        cache_disk_bytes=cache_disk,
        cache_memory_bytes=cache_memory,
    )
    with ExitStack() as stack:
        server_socket = stack.enter_context(closing(ServerSocket(host, port)))  # before the model is loaded
        session, folder = _open(launch_context(context), target, wanted, ranks, strategy)
        stack.enter_context(closing(session))
        greet = partial(_greet, target.name, server_socket, _key_as_typed(keys))
        server = _server(target, session, folder, served_name or (), options, greet)
        _log()
        server_socket.listen()
        server.run([server_socket.socket])


def _open(
    launched: LaunchContext | None, target: Target, wanted: SessionOptions, ranks: int, strategy: str | None
) -> tuple[Session, Path]:
    """The loaded model, and the folder of its text side."""
    if launched is not None:
        ring = open_on_hosts(launched, target, wanted, is_quiet=False)
        return ring, ring.tokenizer_folder
    choice = choose_placement(target, ranks, strategy)
    folder = fetch_model(target, ranks, choice.strategy, is_quiet=False)
    load_config(folder)  # a foreign or broken checkpoint is refused before anything else is read
    print_placement(choice, f"{ranks} ranks", is_quiet=ranks == 1)
    options = replace(wanted, folder=folder, ranks=ranks, strategy=choice.strategy)
    return open_on_this_machine(options, target.name, is_quiet=False), folder


def _keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """All keys that open the server.

    Raises:
        UsageError: a file without keys, or a key that HTTP cannot carry.
    """
    own = Settings.from_environment().api_key
    found = [("--api-key", key) for key in given] + ([("$KIMI_MLX_API_KEY", own)] if own else [])
    if file is not None:
        found += _keys_in(file)
    for where, key in found:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            message = f"{where}: an API key has letters, digits and signs of ASCII, without blanks"
            raise UsageError(message, hint=KEY_HINT)
    return tuple(dict.fromkeys(key for _, key in found))


def _keys_in(file: Path) -> list[tuple[str, str]]:
    """The keys in a file, each after the place where it is."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"cannot read `{file}`: there is no such file", hint=FILE_HINT) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read `{file}`: it is not text in UTF-8", hint=FILE_HINT) from error
    except OSError as error:
        raise UsageError(f"cannot read `{file}`: {error.strerror}", hint=FILE_HINT) from error
    lines = [COMMENT.sub("", line).strip() for line in text.splitlines()]
    found = [(f"`{file}`, line {number}", line) for number, line in enumerate(lines, 1) if line]
    if not found:
        raise UsageError(f"`{file}` has no key", hint=FILE_HINT)
    return found


def _server(
    target: Target,
    session: Session,
    folder: Path,
    names: Sequence[str],
    options: ServingOptions,
    greet: Callable[[ChatTokenizer], None],
) -> Server:
    """The server of a loaded model."""
    from kimi_mlx.server.model_info import ModelInfo
    from kimi_mlx.server.server import Server

    entry = target.entry
    own = [target.name if target.folder is None or entry else folder.resolve().name]
    if entry is not None:
        own += [each for each in (entry.alias, entry.repository, entry.original_repository) if each is not None]
    own += [each.partition("/")[2] for each in own if "/" in each]
    name, *aliases = dict.fromkeys([*names, *own])
    model_info = ModelInfo(name, aliases, load_config(folder).max_position_embeddings, int(time.time()))
    instant = entry.instant_sampling if entry is not None else None
    tokenizer = ChatTokenizer.load(folder, defaults=entry.default_sampling() if entry else None)
    sampling = instant.recommended() if instant else {}
    return Server(session, tokenizer, model_info, sampling, options, partial(greet, tokenizer))


def _log() -> None:
    """The server's log goes to stderr, a line a request."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name, level in (("kimi_mlx", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)


def _key_as_typed(keys: Sequence[str]) -> str | None:
    """How a command names a key: never itself, as terminals are seen by others."""
    if not keys:
        return None
    return "$KIMI_MLX_API_KEY" if Settings.from_environment().api_key in keys else "KEY"


def _greet(name: str, server_socket: ServerSocket, key: str | None, tokenizer: ChatTokenizer) -> None:
    """Where it is, and what to type next."""
    stderr.print(f"{name} is served; base URL {server_socket.url}/v1 (Ctrl-C ends it)", markup=False)
    if others := server_socket.other_urls:
        stderr.print(f"other machines find it on {', '.join(f'{each}/v1' for each in others)}", markup=False)
    header = "" if key is None else f' -H "Authorization: Bearer {key}"'
    if tokenizer.has_chat_template and tokenizer.has_tokenizer:
        path, body = "chat/completions", '{"messages": [{"role": "user", "content": "Hello"}]}'
    elif tokenizer.has_tokenizer:
        path, body = "completions", '{"prompt": "Once upon a time", "max_tokens": 20}'
    else:
        path, body = "completions", '{"prompt": [1, 2, 3], "max_tokens": 20}'
    stderr.print(f"try: curl {server_socket.url}/v1/{path}{header} -d '{body}'", style="dim", markup=False)
