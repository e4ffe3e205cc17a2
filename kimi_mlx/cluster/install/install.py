"""Install the running kimi-mlx on hosts that lack it, in a virtual environment in the user's data folder.

`install.sh` does the work on each host. It does not use root and changes no other Python of the user.
"""

from __future__ import annotations

import json
import os
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kimi_mlx.cluster.channel.host_process import HostProcess, terminate_all
from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.cluster.hosts.facts import VENV_PYTHON, Facts, Interpreter, parse_interpreter, source, with_variables
from kimi_mlx.cluster.hosts.ssh import script_on
from kimi_mlx.cluster.install.install_errors import (
    InstallProblem,
    explain_exit,
    explain_failure,
    explain_timeout,
    install_error,
)
from kimi_mlx.cluster.install.wheel import build_wheel
from kimi_mlx.temporary import temporary_folder

INSTALL_LIMIT_S = 15 * 60.0
"""Time limit for all hosts; they install in parallel."""

REPORT_INTERVAL_S = 5.0
"""If a host reports nothing for this long, report the last line of pip or uv."""

LINE_WIDTH = 100
"""Maximum number of characters of that line."""

END_PATIENCE_S = 2.0
"""Time that a host's ssh client may take to exit."""

Report = Callable[[str], None]


def has_same_packages(interpreter: Interpreter, own: Interpreter) -> bool:
    """Return whether an interpreter has our code of kimi-mlx, and our versions of kimi-mlx, mlx and mlx-lm."""
    return interpreter.code == own.code and all(
        interpreter.packages.get(name) == version for name, version in own.packages.items()
    )


def needs_install(facts: Facts, own: Interpreter) -> bool:
    """Return whether no interpreter of a host has our packages and our minor version of Python."""
    return not any(has_same_packages(python, own) and python.minor == own.minor for python in facts.interpreters)


def prefer_matching(facts: Facts, own: Interpreter) -> Facts:
    """Return the facts with the interpreters that match ours first, so that `facts.python` is one of them.

    Otherwise `facts.python` is the first one with any kimi-mlx, even if `--install` made a matching one.
    """

    def mismatch(interpreter: Interpreter) -> tuple[bool, bool]:
        return not has_same_packages(interpreter, own), interpreter.minor != own.minor

    return replace(facts, interpreters=tuple(sorted(facts.interpreters, key=mismatch)))


def can_upgrade(facts: Facts, own: Interpreter) -> bool:
    """Return whether only kimi-mlx itself has to be replaced in the environment that `--install` made on a host."""
    path = f"{facts.data_folder}/{VENV_PYTHON}"
    others = {name: version for name, version in own.packages.items() if name != "kimi-mlx"}
    return any(
        python.path == path
        and python.minor == own.minor
        and "kimi-mlx" in python.packages
        and all(python.packages.get(name) == version for name, version in others.items())
        for python in facts.interpreters
    )


def install_script(facts: Facts, own: Interpreter, wheel: Path) -> str:
    """Return the script for a host; it reads the wheel from standard input.

    Args:
        facts: facts of the host; its data folder must be known.
        own: interpreter whose versions the host gets.
        wheel: path of the wheel of kimi-mlx.
    """
    assert facts.data_folder is not None
    pins = [f"{name}=={version}" for name, version in own.packages.items() if name != "kimi-mlx"]
    variables = {
        "install_data": facts.data_folder,
        "install_minor": own.minor,
        "install_uv": facts.uv or "",
        "install_upgrade": str(int(can_upgrade(facts, own))),
        "install_wheel": wheel.name,
        "install_bytes": str(wheel.stat().st_size),
        "install_pins": "\n".join(pins),
        "install_versions": source("cluster/hosts/versions.py"),
    }
    return with_variables(variables, source("cluster/install/install.sh"))


def install(hosts: Mapping[str, Facts], own: Interpreter, report: Report, limit_s: float = INSTALL_LIMIT_S) -> None:
    """Install kimi-mlx on hosts, in parallel. A failure on one host does not stop the others.

    Args:
        hosts: host name -> facts, for the hosts that need it.
        own: interpreter of this machine.
        report: callback for progress messages; each starts with the host name.
        limit_s: time limit in seconds for all hosts.

    Raises:
        InstallError: the installation failed on a host. The host keeps its former environment, or has none.
    """
    with temporary_folder("wheel-") as folder:
        wheel = build_wheel(folder.path)
        run = _Run(hosts, own, report)
        try:
            run.start(wheel)
            run.watch(limit_s)
        finally:
            run.close()
    if run.problems:
        raise install_error(run.problems)


@dataclass
class _Host:
    facts: Facts
    process: HostProcess
    step: str = "connecting"
    last_report_at: float = 0.0
    is_done: bool = False


class _Run:
    def __init__(self, hosts: Mapping[str, Facts], own: Interpreter, report: Report):
        self.problems: dict[str, InstallProblem] = {}
        self._facts = hosts
        self._own = own
        self._report_line = report
        self._inbox: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
        self._hosts: dict[str, _Host] = {}
        self._started_at = time.monotonic()

    def start(self, wheel: Path) -> None:
        data = wheel.read_bytes()
        for number, (name, facts) in enumerate(self._facts.items()):
            if facts.data_folder is None:
                self.problems[name] = InstallProblem("it did not report its data folder", "try again")
                continue
            start = script_on(name, install_script(facts, self._own, wheel))
            process = HostProcess(number, start.command, os.environ, self._deliver, start.data + data, start.mark)
            self._hosts[name] = _Host(facts, process, last_report_at=self._started_at)

    def watch(self, limit_s: float) -> None:
        """Handle messages until every host has finished or failed."""
        names = list(self._facts)
        end = self._started_at + limit_s
        while pending := [name for name, host in self._hosts.items() if not host.is_done]:
            now = time.monotonic()
            if now > end:
                for name in pending:
                    self._fail(name, explain_timeout(limit_s, self._hosts[name].step, self._hosts[name].process.output))
                return
            for name in pending:
                self._report_waiting(name, now)
            try:
                number, message = self._inbox.get(timeout=min(1.0, end - now + 0.01))
            except queue.Empty:
                continue
            if not self._hosts[names[number]].is_done:
                self._on_message(names[number], message)

    def close(self) -> None:
        """Stop running installations, on the hosts too: install.sh exits when its input ends."""
        terminate_all([host.process for host in self._hosts.values()], END_PATIENCE_S)

    def _on_message(self, name: str, message: Message | None) -> None:
        host = self._hosts[name]
        if message is None:
            self._fail(name, explain_exit(name, host.process, time.monotonic() - self._started_at))
        elif message["kind"] == "step":
            host.step = str(message["text"])
            self._report(name, host.step)
        elif message["kind"] == "failed":
            host.process.close_input()
            host.process.release(END_PATIENCE_S)  # then all of its standard error has arrived
            self._fail(name, explain_failure(host.facts, str(message["text"]), host.process.output))
        elif message["kind"] == "installed":
            self._check_installed(name, parse_interpreter(json.dumps(message["interpreter"])))

    def _check_installed(self, name: str, installed: Interpreter | None) -> None:
        """Compare the installed interpreter with ours."""
        host, own = self._hosts[name], self._own
        if installed is None or not has_same_packages(installed, own):
            there = "nothing" if installed is None else f"{dict(installed.packages)}, code {installed.code}"
            here = f"{dict(own.packages)}, code {own.code}"
            message = f"the installed version differs from this machine's: installed {there}; here {here}"
            hint = "try again; a file of kimi-mlx may have changed during the installation"
            self._fail(name, InstallProblem(message, hint))
            return
        host.is_done = True
        note = ""
        if installed.minor != own.minor:
            note = f"; its Python is {installed.minor}, ours is {own.minor}; install uv there to get {own.minor}"
        elapsed = time.monotonic() - self._started_at
        self._report(name, f"kimi-mlx {installed.packages['kimi-mlx']} is installed, {elapsed:.0f} s{note}")

    def _fail(self, name: str, problem: InstallProblem) -> None:
        self._hosts[name].is_done = True
        self.problems[name] = problem
        self._report(name, problem.message.partition("\n")[0])

    def _report_waiting(self, name: str, now: float) -> None:
        host = self._hosts[name]
        if now - host.last_report_at >= REPORT_INTERVAL_S:
            line = host.process.last_line.strip()[:LINE_WIDTH]
            self._report(name, f"{host.step}, {now - self._started_at:.0f} s" + (f": {line}" if line else ""))

    def _report(self, name: str, text: str) -> None:
        self._hosts[name].last_report_at = time.monotonic()
        self._report_line(f"{name}: {text}")

    def _deliver(self, number: int, message: Message | None) -> None:
        self._inbox.put((number, message))
