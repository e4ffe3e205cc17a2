"""Bringing the kimi-mlx that runs here to hosts that lack it: an environment of its own in the user's data folder.

What is done on a host is `install.sh`. Nothing is done as root, and no Python that the user has set up is changed.
"""

from __future__ import annotations

import json
import os
import queue
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kimi_mlx.cluster.channel.host_process import HostProcess, terminate_all
from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.cluster.hosts.facts import VENV_PYTHON, Facts, Interpreter, parse_interpreter, source, with_variables
from kimi_mlx.cluster.hosts.ssh import is_local, script_command, ssh_command
from kimi_mlx.cluster.install.install_errors import (
    InstallProblem,
    explain_ending,
    explain_failure,
    explain_late,
    install_error,
)
from kimi_mlx.cluster.install.wheel import build_wheel

INSTALL_LIMIT_S = 15 * 60.0
"""For all hosts together: they work at the same time."""

REPORT_INTERVAL_S = 5.0
"""After so long without news, the last line of pip or uv is told."""

LINE_WIDTH = 100
"""How much of that line."""

END_PATIENCE_S = 2.0
"""How long a host's client may take to end."""

Say = Callable[[str], None]


def has_same_packages(found: Interpreter, own: Interpreter) -> bool:
    """Whether an interpreter of a host has what ours has: kimi-mlx (its code too), mlx and mlx-lm."""
    return found.code == own.code and all(found.packages.get(name) == each for name, each in own.packages.items())


def needs_install(facts: Facts, own: Interpreter) -> bool:
    """Whether none of a host's interpreters will do: the same packages, and the same minor version of Python."""
    return not any(has_same_packages(found, own) and found.minor == own.minor for found in facts.interpreters)


def prefer_matching(facts: Facts, own: Interpreter) -> Facts:
    """The same facts with interpreters that are like ours first, so that `facts.python` is one of them.

    Without this the first one with any kimi-mlx is taken, and an environment of `--install` behind it is not.
    """

    def unlike(found: Interpreter) -> tuple[bool, bool]:
        return not has_same_packages(found, own), found.minor != own.minor

    return replace(facts, interpreters=tuple(sorted(facts.interpreters, key=unlike)))


def can_upgrade(facts: Facts, own: Interpreter) -> bool:
    """Whether a host's environment of `--install` is right but for kimi-mlx itself."""
    path = f"{facts.data_folder}/{VENV_PYTHON}"
    others = {name: version for name, version in own.packages.items() if name != "kimi-mlx"}
    return any(
        found.path == path
        and found.minor == own.minor
        and "kimi-mlx" in found.packages
        and all(found.packages.get(name) == version for name, version in others.items())
        for found in facts.interpreters
    )


def install_script(facts: Facts, own: Interpreter, wheel: Path) -> str:
    """The script for a host; its input is the wheel.

    Args:
        facts: of the host, whose data folder is known.
        own: the interpreter that it shall be like.
        wheel: of kimi-mlx.
    """
    assert facts.data_folder is not None
    pins = [f"{name}=={version}" for name, version in own.packages.items() if name != "kimi-mlx"]
    wanted = {
        "install_data": facts.data_folder,
        "install_minor": own.minor,
        "install_uv": facts.uv or "",
        "install_renew": str(int(can_upgrade(facts, own))),
        "install_wheel": wheel.name,
        "install_bytes": str(wheel.stat().st_size),
        "install_pins": "\n".join(pins),
        "install_versions": source("cluster/hosts/versions.py"),
    }
    return with_variables(wanted, source("cluster/install/install.sh"))


def install(hosts: Mapping[str, Facts], own: Interpreter, say: Say, limit_s: float = INSTALL_LIMIT_S) -> None:
    """Bring kimi-mlx to hosts, all at once. A host that fails does not keep the others from it.

    Args:
        hosts: name -> facts, of those that need it.
        own: this machine's interpreter.
        say: told what is being done, by host.
        limit_s: after which hosts that are not ready are given up.

    Raises:
        InstallError: it is not done on all hosts; what a host had before is then still there, or nothing is.
    """
    with tempfile.TemporaryDirectory(prefix="kimi-mlx-wheel-") as folder:
        wheel = build_wheel(Path(folder))
        run = _Run(hosts, own, say)
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
    last_said: float = 0.0
    is_done: bool = False


class _Run:
    def __init__(self, hosts: Mapping[str, Facts], own: Interpreter, say: Say):
        self.problems: dict[str, InstallProblem] = {}
        self._facts = hosts
        self._own = own
        self._say = say
        self._inbox: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
        self._hosts: dict[str, _Host] = {}
        self._begin = time.monotonic()

    def start(self, wheel: Path) -> None:
        data = wheel.read_bytes()
        for number, (name, facts) in enumerate(self._facts.items()):
            if facts.data_folder is None:
                self.problems[name] = InstallProblem("it did not tell where its user's data are", "try again")
                continue
            script = install_script(facts, self._own, wheel).encode()
            command = script_command(script)
            if not is_local(name):
                command = ssh_command(name, command)
            process = HostProcess(number, command, os.environ, self._deliver, script + data)
            self._hosts[name] = _Host(facts, process, last_said=self._begin)

    def watch(self, limit_s: float) -> None:
        """Hear all hosts until they are done, one way or the other."""
        names = list(self._facts)
        end = self._begin + limit_s
        while waiting := [name for name, host in self._hosts.items() if not host.is_done]:
            now = time.monotonic()
            if now > end:
                for name in waiting:
                    self._give_up(name, explain_late(limit_s, self._hosts[name].step, self._hosts[name].process.words))
                return
            for name in waiting:
                self._say_again(name, now)
            try:
                number, message = self._inbox.get(timeout=min(1.0, end - now + 0.01))
            except queue.Empty:
                continue
            if not self._hosts[names[number]].is_done:
                self._hear(names[number], message)

    def close(self) -> None:
        """End what still runs, on the hosts too: install.sh ends when its input does."""
        terminate_all([host.process for host in self._hosts.values()], END_PATIENCE_S)

    def _hear(self, name: str, message: Message | None) -> None:
        host = self._hosts[name]
        if message is None:
            self._give_up(name, explain_ending(name, host.process, time.monotonic() - self._begin))
        elif message["kind"] == "step":
            host.step = str(message["text"])
            self._tell(name, host.step)
        elif message["kind"] == "failed":
            host.process.close_input()
            host.process.release(END_PATIENCE_S)  # now its last words are here
            self._give_up(name, explain_failure(host.facts, str(message["text"]), host.process.words))
        elif message["kind"] == "installed":
            self._check(name, parse_interpreter(json.dumps(message["found"])))

    def _check(self, name: str, found: Interpreter | None) -> None:
        """What is there now, against what is here."""
        host, own = self._hosts[name], self._own
        if found is None or not has_same_packages(found, own):
            there = "nothing" if found is None else f"{dict(found.packages)}, code {found.code}"
            message = f"what was installed is not what is here: {there}; here: {dict(own.packages)}, code {own.code}"
            self._give_up(name, InstallProblem(message, "was a file of kimi-mlx changed meanwhile? Then try again"))
            return
        host.is_done = True
        note = "" if found.minor == own.minor else f"; its Python is {found.minor}, ours {own.minor}: uv would bring it"
        took = time.monotonic() - self._begin
        self._tell(name, f"kimi-mlx {found.packages['kimi-mlx']} is installed, {took:.0f} s{note}")

    def _give_up(self, name: str, problem: InstallProblem) -> None:
        self._hosts[name].is_done = True
        self.problems[name] = problem
        self._tell(name, problem.message.partition("\n")[0])

    def _say_again(self, name: str, now: float) -> None:
        host = self._hosts[name]
        if now - host.last_said >= REPORT_INTERVAL_S:
            line = host.process.last_line.strip()[:LINE_WIDTH]
            self._tell(name, f"{host.step}, {now - self._begin:.0f} s" + (f": {line}" if line else ""))

    def _tell(self, name: str, text: str) -> None:
        self._hosts[name].last_said = time.monotonic()
        self._say(f"{name}: {text}")

    def _deliver(self, number: int, message: Message | None) -> None:
        self._inbox.put((number, message))
