"""The server of a chat: the one that the user names, or one on this machine that already has the model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import typer

from kimi_mlx.cli.api_keys import read_client_key
from kimi_mlx.cli.chat.options import ChatArguments
from kimi_mlx.cli.confirm import can_ask
from kimi_mlx.cli.local_server import source_of
from kimi_mlx.cli.option_defaults import COMMAND_LINE
from kimi_mlx.cli.option_file import CONFIG_NAME
from kimi_mlx.cli.options import DiskCacheOptions, RunOptions
from kimi_mlx.cli.output import print_note
from kimi_mlx.client.address import ServerAddress, parse_address
from kimi_mlx.client.local_servers import LocalServer, find_servers, is_answering
from kimi_mlx.store.model_ref import ModelRef
from kimi_mlx.units import GB, format_duration

MIN_WEIGHTS_BYTES = GB
"""Size from which a model that is already served is not loaded again."""


@dataclass(frozen=True)
class ServerChoice:
    """A server to chat with.

    Attributes:
        address: its address.
        key: API key; None to send none.
        model: name of the model; None for the server's only one.
    """

    address: ServerAddress
    key: str | None
    model: str | None


def named_server(arguments: ChatArguments, sources: Mapping[str, str]) -> ServerChoice | None:
    """Return the server of `--url`; None without that option.

    A model that is a default of `config.toml` is not required of a server that the user names.

    Args:
        arguments: arguments of the user.
        sources: where the values of options come from, by name.

    Raises:
        UsageError: it is not an address, or the file of the key cannot be read.
    """
    options = arguments.remote
    if options.url is None:
        return None
    is_weak = sources.get("model") == CONFIG_NAME != sources.get("url")
    model = None if is_weak else arguments.run.model
    return ServerChoice(parse_address(options.url), read_client_key(options.api_key_file), model)


def running_server(
    target: ModelRef, arguments: ChatArguments, sources: Mapping[str, str], *, is_conversation: bool
) -> ServerChoice | None:
    """Return a server on this machine that has the model, if the user wants it; None to load the model.

    Without a terminal to ask on, it is used without a question, because a large model rarely fits twice.

    Args:
        target: the model.
        arguments: arguments of the user.
        sources: where the values of options come from; options of how the model runs mean that it is to be loaded.
        is_conversation: whether a conversation begins; before a single answer no question is asked.

    Raises:
        UsageError: the file of the key cannot be read.
    """
    server = _find(target, arguments, sources)
    if server is None:
        return None
    asks = is_conversation and can_ask()
    if asks:
        age = format_duration(max(time.time() - server.started_at, 0))
        question = f"{server.model} is already served at {server.url} (since {age}). Use it?"
        if not typer.confirm(question, default=True, err=True):
            return None
    elif not arguments.output.quiet and not arguments.output.json:
        print_note(f"using the server at {server.url}, which has {server.model}; `--load` loads it here")
    key_file = arguments.remote.api_key_file
    key = read_client_key(key_file)
    if server.needs_key and key is None:
        if not asks:
            print_note(f"{server.url} needs a key (`--api-key-file FILE`): loading {server.model} here instead")
            return None
        key = read_client_key(Path(typer.prompt("It needs a key. File with its API key", err=True)).expanduser())
    return ServerChoice(parse_address(server.url), key, None)


def _find(target: ModelRef, arguments: ChatArguments, sources: Mapping[str, str]) -> LocalServer | None:
    """Return a server that has the model and answers; None if the model is to be loaded in any case."""
    is_packaged = target.entry is not None and target.entry.is_packaged
    if arguments.remote.load or is_packaged or unused_options(sources):
        return None
    source = source_of(target)
    for server in find_servers():
        if server.source == source and server.weights_bytes >= MIN_WEIGHTS_BYTES and is_answering(server):
            return server
    return None


def unused_options(sources: Mapping[str, str]) -> list[str]:
    """Return the options on the command line that have no effect if a server has the model.

    Args:
        sources: where the values of options come from, by name.
    """
    names = [field.name for group in (RunOptions, DiskCacheOptions) for field in fields(group) if field.name != "model"]
    return [f"--{name.replace('_', '-')}" for name in names if sources.get(name) == COMMAND_LINE]
