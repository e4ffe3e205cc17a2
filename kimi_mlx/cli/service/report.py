"""Report on a service: its state, the health of its server, and the next commands."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.output import escape_controls, slow_status, stderr, stdout
from kimi_mlx.cli.service.definition import hosts_of, model_of, url_of
from kimi_mlx.cli.service.options import DEFAULT_NAME
from kimi_mlx.errors import ServiceError
from kimi_mlx.services.log_file import last_lines
from kimi_mlx.services.service import Service, ServiceManager, ServiceState
from kimi_mlx.services.systemd import needs_login

HEALTH_LIMIT_S = 2.0
START_LIMIT_S = 60.0
"""Time that `install` and `start` wait for the server; loading a large model takes longer."""
POLL_S = 0.3
LOG_LINES = 5
"""Number of lines of the log in the error of a server that does not start."""

CLEAN_EXITS = (None, "0", "130", "143")
"""Exits of a server that was stopped, by Ctrl-C or SIGTERM too; None if it has not been started."""

Health = Literal["up", "down", "no answer"]


@dataclass(frozen=True)
class ServiceReport:
    """A service and its server.

    Attributes:
        service: the service.
        path: path of its file.
        state: state of its process.
        health: health of the server: `up`, `down` (it answers, but its engine has failed), or `no answer`.
        reason: reason of a server that is down; else empty.
        since: local start time of the process, if it is running.
    """

    service: Service
    path: str
    state: ServiceState
    health: Health
    reason: str = ""
    since: str | None = None

    @property
    def is_up(self) -> bool:
        """Whether the server answers requests."""
        return self.state.is_running and self.health == "up"

    @property
    def summary(self) -> str:
        """State in words."""
        if not self.state.is_running:
            is_stopped = self.state.last_exit in CLEAN_EXITS
            return "stopped" if is_stopped else f"not running, last exit: {self.state.last_exit}"
        if self.health == "no answer":
            return "starting: the server does not answer yet"
        return "up" if self.health == "up" else f"down: {self.reason}"


def make_report(manager: ServiceManager, service: Service) -> ServiceReport:
    """Ask the service manager and the server for their state."""
    state = manager.state(service.name)
    health, reason = ask_health(url_of(service)) if state.is_running else ("no answer", "")
    since = None if state.pid is None else _start_time(state.pid)
    return ServiceReport(service, str(manager.path(service.name)), state, health, reason, since)


def ask_health(url: str) -> tuple[Health, str]:
    """Return the health of a server, and the reason if it is down."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine needs no proxy
    try:
        with opener.open(f"{url}/health", timeout=HEALTH_LIMIT_S):
            return "up", ""
    except urllib.error.HTTPError as error:
        with error:
            return "down", _reason(error)
    except (OSError, http.client.HTTPException):
        return "no answer", ""


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        document = json.loads(error.read(10_000))
        return str(document.get("reason") or document)
    except (OSError, ValueError, AttributeError):
        return f"status {error.code}"


def wait_until_up(manager: ServiceManager, service: Service, *, is_quiet: bool) -> ServiceReport:
    """Wait until a server answers, at most START_LIMIT_S.

    Raises:
        ServiceError: the process has ended; the message has the end of its log.
    """
    deadline = time.monotonic() + START_LIMIT_S
    with slow_status(is_quiet) as set_status:
        set_status(f"starting {model_of(service)} at {url_of(service)}")
        while True:
            report = make_report(manager, service)
            if report.is_up or time.monotonic() > deadline:
                return report
            if not report.state.is_running and report.state.last_exit is not None:
                raise _failed_start(report)
            time.sleep(POLL_S)


def _failed_start(report: ServiceReport) -> ServiceError:
    service = report.service
    lines = "\n".join(f"  {line}" for line in last_lines(service.log, LOG_LINES))
    option = name_option(service)
    return ServiceError(
        f"the server of service `{service.name}` ended with {_exit_text(report.state.last_exit)}"
        + (f":\n{lines}" if lines else ""),
        hint="it is installed, and is started again after a while; fix the cause, or type "
        f"`kimi-mlx service uninstall{option}`. `kimi-mlx service logs{option}` shows more",
    )


def _exit_text(last_exit: str | None) -> str:
    return f"exit code {last_exit}" if (last_exit or "").isdigit() else str(last_exit)


def name_option(service: Service) -> str:
    """Return ` --name NAME` for commands in messages; empty for the default name."""
    return "" if service.name == DEFAULT_NAME else f" --name {service.name}"


def print_notes(report: ServiceReport) -> None:
    """Print the result of `install` or `start`, and the next commands."""
    service, option = report.service, name_option(report.service)
    if report.is_up:
        stderr.print(f"{model_of(service)} is ready at {url_of(service)}/v1", markup=False)
    else:
        stderr.print(f"{model_of(service)} is not ready yet: it is still loading, or tries again", markup=False)
    stderr.print(
        f"see it: kimi-mlx service status{option}, kimi-mlx service logs{option} -f", style="dim", markup=False
    )
    if sys.platform == "darwin":
        stderr.print("it stops when you log out; a Mac that sleeps does not answer: docs/service.md", style="dim")
    elif needs_login():
        stderr.print(
            "it runs while you are logged in; to start it at boot: sudo loginctl enable-linger $USER", style="dim"
        )


def print_report(report: ServiceReport) -> None:
    """Print a service on stdout, one fact per line."""
    service, state = report.service, report.state
    hosts = hosts_of(service)
    process = None
    if state.pid is not None:
        process = f"{state.pid}" + (f", since {report.since}" if report.since else "")
    rows = {
        "state": report.summary,
        "model": model_of(service) + ("" if hosts is None else f" on {hosts}"),
        "url": f"{url_of(service)}/v1",
        "process": process,
        "starts": state.starts,
        "last exit": state.last_exit if state.is_running else None,
        "at login": "starts" if state.is_enabled else "does not start",
        "command": shlex.join(service.command),
        "file": report.path,
        "log": str(service.log),
    }
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, Text(escape_controls(value)))
    stdout.print(Text(service.name, style="bold"))
    stdout.print(table, soft_wrap=False)


def report_to_dict(report: ServiceReport) -> dict[str, Any]:
    """Return a report for JSON."""
    service, state = report.service, report.state
    return {
        "name": service.name,
        "is_running": state.is_running,
        "is_up": report.is_up,
        "health": report.health,
        "reason": report.reason or None,
        "pid": state.pid,
        "since": report.since,
        "starts": state.starts,
        "last_exit": state.last_exit,
        "is_enabled": state.is_enabled,
        "model": model_of(service),
        "hosts": hosts_of(service),
        "url": url_of(service),
        "command": list(service.command),
        "environment": dict(service.environment),
        "path": report.path,
        "log": str(service.log),
    }


def _start_time(pid: int) -> str | None:
    """Return the start of a process as `ps` prints it; None if it has ended."""
    plain = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, env=plain)
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.strptime(" ".join(done.stdout.split()), "%a %b %d %H:%M:%S %Y"))
    except ValueError:
        return None
