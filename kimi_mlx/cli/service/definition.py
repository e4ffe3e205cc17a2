"""The service that `kimi-mlx service install` installs: its command, its environment, and checks before it starts."""

from __future__ import annotations

import os
import re
import shlex
import stat
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import typer

from kimi_mlx.cli.host_options import HostOptions
from kimi_mlx.cli.launch import LaunchOptions
from kimi_mlx.cli.launched_command import LaunchedCommand
from kimi_mlx.cli.open_model import name_for_hosts, session_options
from kimi_mlx.cli.option_defaults import LAUNCHED
from kimi_mlx.cli.option_groups import build_group
from kimi_mlx.cli.options import DiskCacheOptions, RunOptions
from kimi_mlx.cli.placement import choose_placement
from kimi_mlx.cli.serve import ServerOptions
from kimi_mlx.errors import ServiceError, UsageError
from kimi_mlx.server.http.server_socket import ServerSocket
from kimi_mlx.services.log_file import log_path
from kimi_mlx.services.service import LOG_VARIABLE, Service
from kimi_mlx.settings import Settings
from kimi_mlx.store.locate import find_local_model
from kimi_mlx.store.model_ref import ModelRef, resolve_model_name

KEPT_PREFIXES = ("KIMI_MLX_", "HF_", "MLX_")
"""Prefixes of environment variables that the service gets, with PATH and FOLDER_VARIABLES."""
SECRETS = re.compile(r"(^|_)(KEYS?|TOKENS?|PASSWORD|SECRETS?)(_|$)")
"""Names of variables that a service never gets: its file is not for secrets, and it downloads nothing."""
FOLDER_VARIABLES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")

CACHE_FOLDERS = (".cache", "Caches")
"""Names of folders whose contents may be deleted at any time."""

SERVE_NAMES = frozenset(
    field.name for group in (RunOptions, ServerOptions, DiskCacheOptions) for field in fields(group)
) - {"model"}
LAUNCH_NAMES = frozenset(field.name for group in (HostOptions, LaunchOptions) for field in fields(group)) - SERVE_NAMES

KEY_FILE_HINT = (
    "write it to a file that only you can read: `openssl rand -hex 24 > ~/kimi-mlx.keys && chmod 600 "
    "~/kimi-mlx.keys`; then add `--api-key-file ~/kimi-mlx.keys`"
)


def define_service(context: typer.Context, name: str) -> tuple[Service, ServerOptions]:
    """Return the service for the options of `kimi-mlx service install`, and the server's options.

    The commands `serve` and `launch` parse the options, with the defaults of `config.toml`. The service keeps these
    values, so that later changes of the file do not change it.

    Args:
        context: context of `install`.
        name: name of the service.

    Raises:
        UsageError: an option is wrong or cannot belong to a service, or the model is not on this machine.
        ServiceError: the program or the user's folders do not last.
    """
    hosts = build_group(HostOptions, context.params)
    is_launched = hosts.hosts is not None or hosts.hostfile is not None
    model = [] if context.params["model"] is None else [context.params["model"]]
    serving = _parse(context, "serve", [*model, *_options(context, SERVE_NAMES)], is_launched=is_launched)
    run, server = build_group(RunOptions, serving.params), build_group(ServerOptions, serving.params)
    _check_secrets(server)
    server.serving()
    session_options(run, build_group(DiskCacheOptions, serving.params))
    if server.port == 0:
        raise UsageError("a service needs a port that stays the same", hint="leave `--port 0` out, or choose a port")
    target = resolve_model_name(run.model_name)
    words = ["serve", name_for_hosts(target), *_options(serving, SERVE_NAMES)]
    if is_launched:
        words = _launch_words(context, words)
    else:
        _check_no_launch_options(context)
        _check_model(target, run)
    log = log_path(name)
    if log is None:
        raise ServiceError("there is no home folder to keep the service's log in", hint="set HOME")
    environment = {**kept_environment(os.environ), LOG_VARIABLE: str(log)}
    return Service(name, (*program(), *words), environment, log), server


def _launch_words(context: typer.Context, words: list[str]) -> list[str]:
    """Return the words of `kimi-mlx launch` for a server on several hosts.

    Raises:
        UsageError: an option is wrong.
    """
    launching = _parse(context, "launch", _options(context, LAUNCH_NAMES))
    hosts = build_group(HostOptions, launching.params)
    hosts.read()
    build_group(LaunchOptions, launching.params).check(hosts)
    LaunchedCommand(launching, words)  # parses the words as `launch` will
    return ["launch", *_options(launching, LAUNCH_NAMES), *words]


def check_port(server: ServerOptions, current: Service | None) -> None:
    """Check that no other program has the server's port.

    Args:
        server: options of the new server.
        current: the running service that it replaces; None without one.

    Raises:
        UsageError: the port is in use, or the address does not belong to this machine.
    """
    if current is None or listening_port(current) != server.port:
        try:
            with closing(ServerSocket(server.host, server.port)) as probe:
                probe.listen()
        except UsageError as error:
            hint = f"add `--port {server.port + 1}`; `kimi-mlx service status` lists the services and their ports"
            raise UsageError(error.message, hint=hint) from error


def option_value(service: Service, option: str) -> str | None:
    """Return the last value of an option in a service's command, which has the form `--option=value`."""
    values = [word.partition("=")[2] for word in service.command if word.startswith(f"{option}=")]
    return values[-1] if values else None


def listening_port(service: Service) -> int:
    """Return the port of a service's server."""
    return int(option_value(service, "--port") or ServerOptions.port)


def url_of(service: Service) -> str:
    """Return the URL of a service's server, for programs on this machine."""
    host = option_value(service, "--host") or ServerOptions.host
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{listening_port(service)}"


def model_of(service: Service) -> str:
    """Return the model of a service: the word after `serve`."""
    words = service.command[service.command.index("serve") + 1 :] if "serve" in service.command else ()
    return next((word for word in words if not word.startswith("-")), "?")


def hosts_of(service: Service) -> str | None:
    """Return the hosts or the hostfile of a service; None if it runs on this machine alone."""
    return option_value(service, "--hosts") or option_value(service, "--hostfile")


def program() -> tuple[str, ...]:
    """Return the command that runs this kimi-mlx, by an absolute path that updates keep.

    The paths in an environment of uv, pipx or venv stay the same when kimi-mlx is updated there.

    Raises:
        ServiceError: the environment is temporary, as that of `uvx` or `pipx run`.
    """
    if any(part in CACHE_FOLDERS for part in Path(sys.prefix).parts):
        raise ServiceError(
            f"this kimi-mlx is in a cache (`{sys.prefix}`), which may be emptied",
            hint="install it: `uv tool install`, `pipx install` or `pip install`; then type the same command again",
        )
    script = Path(sys.executable).with_name("kimi-mlx")
    return (str(script),) if script.is_file() else (sys.executable, "-m", "kimi_mlx")


def kept_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a service gets from the environment of `install`."""
    names = {name for name in environment if name.startswith(KEPT_PREFIXES)} | {"PATH", *FOLDER_VARIABLES}
    return {name: environment[name] for name in sorted(names) if environment.get(name) and not SECRETS.search(name)}


def _check_secrets(server: ServerOptions) -> None:
    """Check that API keys come from a file, and that only the user can read it.

    Raises:
        UsageError: they do not, or others can.
    """
    if server.api_key:
        raise UsageError("--api-key would write the key into the service's file", hint=KEY_FILE_HINT)
    if server.api_key_file is None:
        if Settings.from_environment().api_key is not None:
            raise UsageError("a service does not get $KIMI_MLX_API_KEY, so its server would have no key", KEY_FILE_HINT)
        return
    path = server.api_key_file
    mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else 0
    if mode & 0o077:
        raise UsageError(
            f"other users can read `{path}` (mode {mode:04o})", hint=f"type `chmod 600 {shlex.quote(str(path))}`"
        )


def _check_model(target: ModelRef, run: RunOptions) -> None:
    """Check that a model is on this machine: a service downloads nothing.

    Raises:
        UsageError: it is not here.
        WeightsError: it is here for another number of ranks.
    """
    choice = choose_placement(target, run.ranks, run.strategy)
    if find_local_model(target, run.ranks, choice.strategy) is None:
        ranks = f" --ranks {run.ranks}" if run.ranks > 1 else ""
        raise UsageError(
            f"`{target.name}` is not on this machine, and a service downloads nothing",
            hint=f"type `kimi-mlx download {target.name}{ranks}` first",
        )


def _check_no_launch_options(context: typer.Context) -> None:
    """Refuse options for several hosts without hosts.

    Raises:
        UsageError: there is one.
    """
    options = _options(context, LAUNCH_NAMES)
    if options:
        name = options[0].partition("=")[0]
        raise UsageError(f"`{name}` is for a server on several hosts", hint="add `--hosts mac-a.local,mac-b.local`")


def _parse(context: typer.Context, name: str, words: list[str], *, is_launched: bool = False) -> typer.Context:
    """Return the context of another command that parses words, with the defaults of `config.toml`."""
    root = context.find_root()
    if is_launched:
        root.meta[LAUNCHED] = True
    group: Any = root.command
    return group.get_command(root, name).make_context(name, words, parent=root)


def _options(context: typer.Context, names: frozenset[str]) -> list[str]:
    """Return the options that the command line or `config.toml` sets, as words `--option=value` with absolute paths."""
    words: list[str] = []
    for parameter in context.command.params:
        source: Any = context.get_parameter_source(parameter.name or "")
        if parameter.name not in names or source is None or source.name not in ("COMMANDLINE", "DEFAULT_MAP"):
            continue
        option, value = parameter.opts[0], context.params[parameter.name]
        if isinstance(value, bool):
            words += [option] if value else []
            continue
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        words += [f"{option}={_text(each)}" for each in values]
    return words


def _text(value: Any) -> str:
    """Return the text of an option's value; a path becomes absolute, since a service starts in another folder."""
    return os.path.abspath(os.path.expanduser(value)) if isinstance(value, Path) else str(value)
