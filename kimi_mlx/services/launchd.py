"""Services under launchd: user agents in `~/Library/LaunchAgents`.

Sources: the manual pages launchd.plist(5) and launchctl(1) of macOS.
"""

from __future__ import annotations

import os
import plistlib
import re
import time
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from kimi_mlx.errors import ServiceError
from kimi_mlx.files import write_atomically
from kimi_mlx.services.service import RESTART_DELAY_S, STOP_LIMIT_S, Service, ServiceState, run_command
from kimi_mlx.units import format_count

PREFIX = "kimi-mlx."
"""Beginning of the labels of our agents."""

POLL_S = 0.2

MAX_OPEN_FILES = 8192
"""Soft limit of open files: launchd's is 256, too few for the connections and weight files of a busy server."""


class LaunchAgents:
    """The user agents of kimi-mlx.

    Args:
        folder: folder of the agents; None for that of the user.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = Path.home() / "Library" / "LaunchAgents" if folder is None else folder
        self._domain = f"gui/{os.getuid()}"

    def check(self) -> None:
        """Check that the user is logged in at the screen, where agents run.

        Raises:
            ServiceError: the user is not.
        """
        if run_command(["launchctl", "print", self._domain], is_checked=False).returncode:
            raise ServiceError(
                "you are not logged in at this Mac's screen, and launchd runs your services only there",
                hint="log in once at the screen or by screen sharing; for a Mac without a screen, turn on automatic "
                "login in System Settings > Users & Groups",
            )

    def path(self, name: str) -> Path:
        """Return the path of the property list."""
        return self._folder / f"{PREFIX}{name}.plist"

    def render(self, service: Service) -> str:
        """Return the property list, as XML."""
        agent: dict[str, Any] = {
            "Label": f"{PREFIX}{service.name}",
            "ProgramArguments": list(service.command),
            "EnvironmentVariables": dict(service.environment),
            "WorkingDirectory": "/",
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False, "Crashed": True},
            "ThrottleInterval": RESTART_DELAY_S,
            "ExitTimeOut": STOP_LIMIT_S,
            "ProcessType": "Interactive",  # any other type is slowed down
            "LimitLoadToSessionType": "Aqua",
            "SoftResourceLimits": {"NumberOfFiles": MAX_OPEN_FILES},
            "Umask": 0o077,
            "StandardOutPath": str(service.log),
            "StandardErrorPath": str(service.log),
        }
        return plistlib.dumps(agent, sort_keys=False).decode()

    def read(self, name: str) -> Service | None:
        """Return the service of a property list.

        Raises:
            ServiceError: the file cannot be read, or keys are missing.
        """
        path = self.path(name)
        try:
            agent = plistlib.loads(path.read_bytes())
            command, log = tuple(map(str, agent["ProgramArguments"])), Path(agent["StandardErrorPath"])
            return Service(name, command, agent.get("EnvironmentVariables", {}), log)
        except FileNotFoundError:
            return None
        except (OSError, ExpatError, plistlib.InvalidFileException, ValueError, KeyError, TypeError) as error:
            raise ServiceError(f"`{path}` is not a service of kimi-mlx: {error!r}", hint="remove this file") from error

    def names(self) -> list[str]:
        """Return the names of the installed agents."""
        return sorted(path.stem.removeprefix(PREFIX) for path in self._folder.glob(f"{PREFIX}*.plist"))

    def install(self, service: Service) -> None:
        """Write the property list and load it, which starts the server."""
        self.stop(service.name)
        path = self.path(service.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.render(service).encode())
        path.chmod(0o600)
        self.start(service.name)

    def start(self, name: str) -> None:
        """Load the agent, or start it if it is loaded and not running."""
        if self._is_loaded(name):
            run_command(["launchctl", "kickstart", self._target(name)])  # no effect while it is running
            return
        run_command(["launchctl", "enable", self._target(name)])  # if the user has disabled it
        run_command(["launchctl", "bootstrap", self._domain, str(self.path(name))])

    def stop(self, name: str) -> None:
        """Unload the agent, and wait until its process has ended."""
        if not self._is_loaded(name):
            return
        # reports "operation now in progress" if the process takes a while
        done = run_command(["launchctl", "bootout", self._target(name)], limit_s=STOP_LIMIT_S, is_checked=False)
        deadline = time.monotonic() + STOP_LIMIT_S
        while self._is_loaded(name):
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"service `{name}` did not end within {STOP_LIMIT_S} s: {done.stderr.strip()}",
                    hint=f"type `launchctl kill SIGKILL {self._target(name)}`",
                )
            time.sleep(POLL_S)

    def remove(self, name: str) -> None:
        """Unload the agent and remove its property list."""
        self.stop(name)
        self.path(name).unlink(missing_ok=True)

    def state(self, name: str) -> ServiceState:
        """Return the state that `launchctl print` shows."""
        done = run_command(["launchctl", "print", self._target(name)], is_checked=False)
        is_enabled = self.path(name).exists()
        return parse_state(done.stdout, is_enabled) if done.returncode == 0 else ServiceState(False, is_enabled)

    def _is_loaded(self, name: str) -> bool:
        return run_command(["launchctl", "print", self._target(name)], is_checked=False).returncode == 0

    def _target(self, name: str) -> str:
        return f"{self._domain}/{PREFIX}{name}"


def parse_state(text: str, is_enabled: bool) -> ServiceState:
    """Return the state in the output of `launchctl print`, whose format Apple does not promise to keep.

    Args:
        text: the output; of its nested lines, only those of the service itself, indented by one tab, count.
        is_enabled: whether the property list is installed.
    """
    values = dict(re.findall(r"^\t([a-z ]+) = (.+)$", text, re.MULTILINE))
    pid = int(values["pid"]) if values.get("pid", "").isdigit() else None
    last = values.get("last exit code")
    signal = values.get("last terminating signal")
    if signal is not None:
        last = f"signal {signal.rpartition(' ')[2]}"  # from `Killed: 9`
    elif last is not None and "never" in last:
        last = None
    starts = values.get("runs") if values.get("runs", "").isdigit() else None
    return ServiceState(
        pid is not None, is_enabled, pid, last, None if starts is None else format_count(int(starts), "start")
    )
