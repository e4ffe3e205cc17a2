"""A background service, and the protocol of the service managers: launchd and systemd."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kimi_mlx.errors import ServiceError, UsageError

RESTART_DELAY_S = 10
"""Time between the end of a failed server and its next start."""

STOP_LIMIT_S = 900
"""Time for a server to end before it is killed: a kill while hundreds of gigabytes are wired can lose that memory."""

COMMAND_LIMIT_S = 60
"""Limit of a command of launchctl or systemctl that does not wait for a server."""

LOG_VARIABLE = "KIMI_MLX_SERVICE_LOG"
"""Environment variable with the log file of a service; see log_file.py."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
_REFUSED_CHARS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and what Python makes of bytes that are not UTF-8: neither can be in a service's file."""


@dataclass(frozen=True)
class Service:
    """A program to run in the background.

    Args:
        name: name of the service: lower-case letters, digits and hyphens.
        command: absolute path of the program, and its arguments.
        environment: environment variables.
        log: file for its output.

    Raises:
        UsageError: invalid name, or text in the command or the environment that has control characters or is not UTF-8.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path

    def __post_init__(self) -> None:
        check_name(self.name)
        for text in (*self.command, *self.environment, *self.environment.values(), str(self.log)):
            if _REFUSED_CHARS.search(text):
                raise UsageError(f"{text!a} has control characters or is not UTF-8, which a service cannot have")


@dataclass(frozen=True)
class ServiceState:
    """State of a service, as launchd or systemd reports it.

    Attributes:
        is_running: whether its process is running.
        is_enabled: whether it starts at the next login.
        pid: process id while it is running.
        last_exit: exit code of the last process, or what ended it (such as `signal 9`); None if none has ended.
        starts: number of starts since it was loaded (launchd), or of restarts after a failure (systemd), in words; None
            if it is unknown, or 0.
    """

    is_running: bool
    is_enabled: bool
    pid: int | None = None
    last_exit: str | None = None
    starts: str | None = None


class ServiceManager(Protocol):
    """launchd or systemd. Its methods raise ServiceError if a command of it fails."""

    def check(self) -> None:
        """Check that services of this user can run.

        Raises:
            ServiceError: they cannot; the hint says what to do.
        """
        ...

    def path(self, name: str) -> Path:
        """Return the path of the service's file."""
        ...

    def render(self, service: Service) -> str:
        """Return the text of the service's file."""
        ...

    def read(self, name: str) -> Service | None:
        """Return an installed service; None if there is none.

        Raises:
            ServiceError: the file was edited and cannot be understood.
        """
        ...

    def names(self) -> list[str]:
        """Return the names of the installed services."""
        ...

    def install(self, service: Service) -> None:
        """Write the file of a service, replacing an older one, and start the service."""
        ...

    def start(self, name: str) -> None:
        """Start an installed service; do nothing if it is running."""
        ...

    def stop(self, name: str) -> None:
        """Stop a service until the next login or start(), and wait for its end."""
        ...

    def remove(self, name: str) -> None:
        """Stop a service and remove its file."""
        ...

    def state(self, name: str) -> ServiceState:
        """Return the state of an installed service."""
        ...


def check_name(name: str) -> None:
    """Check the name of a service.

    Raises:
        UsageError: it cannot be part of a file name everywhere.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"`{name}` is not a name for a service",
            hint="use up to 40 lower-case letters, digits and hyphens, such as `--name k2`",
        )


def run_command(
    command: Sequence[str], *, limit_s: float = COMMAND_LIMIT_S, is_checked: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command of the service manager.

    Args:
        command: the command and its arguments.
        limit_s: time limit.
        is_checked: whether an exit code other than 0 is an error.

    Raises:
        ServiceError: the command is missing, takes too long or fails.
    """
    text = " ".join(command)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=limit_s
        )
    except FileNotFoundError as error:
        raise ServiceError(f"`{command[0]}` is not on this machine", hint="services need launchd or systemd") from error
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"`{text}` did not end within {limit_s:.0f} s", hint="run it in a terminal") from error
    if is_checked and done.returncode:
        output = (done.stderr.strip() or done.stdout.strip()).splitlines()
        reason = f": {output[-1]}" if output else ""
        raise ServiceError(f"`{text}` failed with exit code {done.returncode}{reason}")
    return done
