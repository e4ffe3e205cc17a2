"""Services under systemd: user units in `~/.config/systemd/user`.

Sources: the manual pages systemd.unit(5), systemd.service(5), systemd.exec(5) and systemd.syntax(7). Version 244 and
later have all options used here.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import subprocess
from pathlib import Path

from kimi_mlx.errors import ServiceError
from kimi_mlx.files import write_atomically
from kimi_mlx.services.service import COMMAND_LIMIT_S, RESTART_DELAY_S, STOP_LIMIT_S, Service, ServiceState, run_command
from kimi_mlx.units import format_count

PREFIX, SUFFIX = "kimi-mlx-", ".service"
"""Beginning and end of the names of our units."""

MAX_FAILURES, FAILURES_INTERVAL_S = 60, 3600
"""A service that fails more often than this within the interval stays down, until the next login or `start`."""

LINGER_FOLDER = Path("/var/lib/systemd/linger")
"""Folder with a file for each user whose services also run without a login."""

_UNIT = """\
# Written by `kimi-mlx service install`, which overwrites changes.
[Unit]
Description=kimi-mlx: {name}
StartLimitIntervalSec={interval}
StartLimitBurst={failures}

[Service]
Type=exec
ExecStart=:{command}
{environment}
WorkingDirectory=/
UMask=0077
Restart=on-failure
RestartSec={delay}
SuccessExitStatus=130 143
KillMode=mixed
TimeoutStopSec={stop_limit}
StandardOutput=append:{log}
StandardError=append:{log}

[Install]
WantedBy=default.target
"""


class UserUnits:
    """The user units of kimi-mlx.

    Args:
        folder: folder of the units; None for that of the user.
    """

    def __init__(self, folder: Path | None = None):
        config = os.environ.get("XDG_CONFIG_HOME", "")
        base = Path(config) if os.path.isabs(config) else Path.home() / ".config"
        self._folder = base / "systemd" / "user" if folder is None else folder

    def check(self) -> None:
        """Check that the user's systemd answers.

        Raises:
            ServiceError: it does not.
        """
        done = _systemctl("show", "--property=Version", is_checked=False)
        if done.returncode:
            raise ServiceError(
                f"your systemd does not answer: {done.stderr.strip()}",
                hint="log in to this machine directly or over ssh, not through `su` or `sudo`; containers usually have "
                "no systemd",
            )

    def path(self, name: str) -> Path:
        """Return the path of the unit."""
        return self._folder / _unit(name)

    def render(self, service: Service) -> str:
        """Return the unit. The `:` before the command keeps systemd from replacing `$` in it."""
        return _UNIT.format(
            name=service.name,
            interval=FAILURES_INTERVAL_S,
            failures=MAX_FAILURES,
            command=" ".join(map(quote, service.command)),
            environment="\n".join(
                f"Environment={quote(f'{name}={value}')}" for name, value in sorted(service.environment.items())
            ),
            delay=RESTART_DELAY_S,
            stop_limit=STOP_LIMIT_S,
            log=str(service.log).replace("%", "%%"),
        )

    def read(self, name: str) -> Service | None:
        """Return the service of a unit.

        Raises:
            ServiceError: the unit cannot be read, or lines are missing.
        """
        path = self.path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ServiceError(f"cannot read `{path}`: {error}", hint="remove this file") from error
        try:
            command = re.findall(r"^ExecStart=:(.*)$", text, re.MULTILINE)[0]
            log = re.findall(r"^StandardError=append:(.*)$", text, re.MULTILINE)[0]
            assignments = unquote(" ".join(re.findall(r"^Environment=(.*)$", text, re.MULTILINE)))
            environment = dict(assignment.split("=", 1) for assignment in assignments)
            return Service(name, tuple(unquote(command)), environment, Path(log.replace("%%", "%")))
        except (IndexError, ValueError) as error:
            raise ServiceError(f"`{path}` is not a service of kimi-mlx", hint="remove this file") from error

    def names(self) -> list[str]:
        """Return the names of the installed units."""
        files = self._folder.glob(f"{PREFIX}*{SUFFIX}")
        return sorted(path.name.removeprefix(PREFIX).removesuffix(SUFFIX) for path in files)

    def install(self, service: Service) -> None:
        """Write the unit, enable it, and start or restart the server."""
        path, unit = self.path(service.name), _unit(service.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.render(service).encode())
        path.chmod(0o600)
        _systemctl("daemon-reload")
        _systemctl("enable", unit)
        _systemctl("reset-failed", unit, is_checked=False)
        _systemctl("restart", unit, limit_s=STOP_LIMIT_S + 60)

    def start(self, name: str) -> None:
        """Start the unit, even if it has failed too often."""
        _systemctl("reset-failed", _unit(name), is_checked=False)
        _systemctl("start", _unit(name))

    def stop(self, name: str) -> None:
        """Stop the unit, and wait for its end."""
        _systemctl("stop", _unit(name), limit_s=STOP_LIMIT_S + 60)

    def remove(self, name: str) -> None:
        """Stop and disable the unit, and remove it."""
        _systemctl("disable", "--now", _unit(name), limit_s=STOP_LIMIT_S + 60)
        self.path(name).unlink(missing_ok=True)
        _systemctl("daemon-reload")
        _systemctl("reset-failed", _unit(name), is_checked=False)

    def state(self, name: str) -> ServiceState:
        """Return the state that `systemctl show` prints."""
        properties = "MainPID,ExecMainCode,ExecMainStatus,NRestarts,UnitFileState"
        text = _systemctl("show", _unit(name), f"--property={properties}").stdout
        values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        pid = int(values.get("MainPID") or 0) or None
        restarts = int(values.get("NRestarts") or 0)
        return ServiceState(
            pid is not None,
            values.get("UnitFileState") == "enabled",
            pid,
            _last_exit(values.get("ExecMainCode", "0"), values.get("ExecMainStatus", "0")),
            f"{format_count(restarts, 'restart')} after a failure" if restarts else None,
        )


def needs_login() -> bool:
    """Return whether the user's services end when the user logs out, and start only at login."""
    return not (LINGER_FOLDER / pwd.getpwuid(os.getuid()).pw_name).exists()


def quote(word: str) -> str:
    """Return a word for `ExecStart=:` or `Environment=`: in double quotes, and with `%` doubled."""
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def unquote(text: str) -> list[str]:
    """Return the words that quote() wrote, separated by blanks.

    Raises:
        ValueError: a quote is not closed.
    """
    return [word.replace("%%", "%") for word in shlex.split(text)]


def _last_exit(code: str, status: str) -> str | None:
    """Return how the last process ended; `code` is that of waitid(2): 1 exited, 2 killed, 3 dumped core."""
    return {"1": status, "2": f"signal {status}", "3": f"signal {status}"}.get(code)


def _unit(name: str) -> str:
    return f"{PREFIX}{name}{SUFFIX}"


def _systemctl(
    *arguments: str, limit_s: float = COMMAND_LIMIT_S, is_checked: bool = True
) -> subprocess.CompletedProcess[str]:
    return run_command(["systemctl", "--user", *arguments], limit_s=limit_s, is_checked=is_checked)
