"""Lose a rank, a cable, a host or the front in the middle of an answer, and measure the recovery.

`python -m tests.cluster.faults` prints a table of all faults, one answer each, on two hosts over ssh.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.cluster.hosts import ROOT, Hosts, missing_requirement

QUESTION = ("chat", "kimi-mini", "-t", "0", "-p", "Draw a pelican")
"""The answer has 283 tokens, 559 characters."""

MIDDLE = 100
"""Number of characters of the answer between two faults."""

RECONNECTING, CONTINUES, ERROR = "reconnecting in", "the answer continues", "error: "
"""Messages of the front on stderr."""

LIMIT_S = 120.0
"""Time limit of any wait; long, because the machine may be busy."""

MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this runs in the background
from kimi_mlx.cli.app import main
main()
"""


def environment(hosts: Hosts) -> dict[str, str]:
    """The front's variables, with folders of its own for logs and temporary files."""
    front = hosts.folder / "front"
    for name in ("tmp", "state"):
        (front / name).mkdir(parents=True, exist_ok=True)
    ours = {"PATH": hosts.path, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"}
    return {**os.environ, **ours, "TMPDIR": str(front / "tmp"), "XDG_STATE_HOME": str(front / "state")}


def write_hostfile(hosts: Hosts, path: Path) -> str:
    """A hostfile with the hosts' Thunderbolt addresses."""
    path.write_text(json.dumps([{"ssh": name, "ips": [hosts.address(name)]} for name in hosts.names]))
    return str(path)


def run_without_faults(*options: str) -> str:
    """Return the answer of one process on this machine."""
    command = [sys.executable, "-c", MAIN, *QUESTION, *options]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout


class Front:
    """A process of `kimi-mlx launch`; its output is recorded with times.

    Args:
        hosts: test hosts that `ssh` reaches.
        arguments: arguments of `launch`.
        code: Python code that the process runs.
    """

    def __init__(self, hosts: Hosts, *arguments: str, code: str = MAIN):
        self.hosts = hosts
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "launch", *arguments],
            env=environment(hosts),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.out: list[tuple[float, str]] = []
        """(time, text) of each chunk of standard output."""
        self.err: list[tuple[float, str]] = []
        """(time, text) of each chunk of standard error."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._threads = [
            threading.Thread(target=_record, args=each, daemon=True)
            for each in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def text(self) -> str:
        """Standard output so far."""
        return "".join(piece for _, piece in self.out.copy())

    @property
    def errors(self) -> str:
        """Standard error so far."""
        return "".join(line for _, line in self.err.copy())

    def wait(self, condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Wait until a condition holds; fail if the process exits first or the time is over."""
        end = time.monotonic() + limit_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self._join()
                if condition():
                    return
                raise AssertionError(f"{self.process.poll()}: {self.text!r}, {self.errors}")
            time.sleep(0.01)

    def wait_for_text(self, characters: int) -> None:
        """Wait until standard output has this number of characters."""
        self.wait(lambda: len(self.text) >= characters)

    def wait_for_message(self, message: str, times: int = 1) -> None:
        """Wait until standard error contains a message this number of times."""
        self.wait(lambda: self.errors.count(message) >= times)

    def end(self, limit_s: float = LIMIT_S) -> int:
        """Wait for the process to exit; return its exit code."""
        try:
            code = self.process.wait(limit_s)
        finally:
            self.process.kill()
            self.process.wait()
            self._join()
        return code

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(5)


def _record(pipe: IO[bytes], chunks: list[tuple[float, str]]) -> None:
    with pipe:
        for piece in iter(lambda: os.read(pipe.fileno(), 1 << 16), b""):
            chunks.append((time.monotonic(), piece.decode()))


def rank_pid(hosts: Hosts, name: str, module: str = "kimi_mlx.rank.main") -> int | None:
    """Return the process id of the rank on a host, not of its guard."""
    for line in hosts.run(name, "ps", "-A", "-ww", "-o", "pid=,args=").splitlines():
        if f"from {module} import main" in line and "cluster.ring.guard" not in line:
            return int(line.split()[0])
    return None


def guard_pid(hosts: Hosts, name: str) -> int:
    """Return the process id of the rank's guard on a host."""
    lines = hosts.run(name, "ps", "-A", "-ww", "-o", "pid=,args=").splitlines()
    return next(int(line.split()[0]) for line in lines if "from kimi_mlx.cluster.ring.guard import main" in line)


def send(hosts: Hosts, name: str, number: signal.Signals, pid: int | None) -> None:
    """Send a signal to a process on a host."""
    assert pid is not None
    hosts.run(name, "kill", f"-{number.value}", str(pid))


@dataclass(frozen=True)
class Fault:
    """A fault in the middle of an answer.

    Args:
        name: description for the table.
        inflict: function that causes the fault, and repairs it if that belongs to the fault.
        options: options of `launch` for this fault.
        is_noticed: whether the ring stops and reconnects.
        ends: whether the front ends with an error or by a signal, without the whole answer.
    """

    name: str
    inflict: Callable[[Front], None]
    options: tuple[str, ...] = ()
    is_noticed: bool = True
    ends: bool = False


def signalled(number: signal.Signals, name: str, *options: str) -> Fault:
    """Send a signal to the rank on a host."""

    def inflict(front: Front) -> None:
        send(front.hosts, name, number, rank_pid(front.hosts, name))

    return Fault(f"{number.name} to the rank on {name}", inflict, options)


def guard_killed(name: str) -> Fault:
    """Kill the guard of the rank on a host."""

    def inflict(front: Front) -> None:
        send(front.hosts, name, signal.SIGKILL, guard_pid(front.hosts, name))

    return Fault(f"SIGKILL to the guard on {name}", inflict)


def session_killed(name: str) -> Fault:
    """Kill the SSH server's process of the session; the server itself keeps running."""

    def inflict(front: Front) -> None:
        parent = front.hosts.run(name, "ps", "-o", "ppid=", "-p", str(guard_pid(front.hosts, name))).strip()
        send(front.hosts, name, signal.SIGKILL, int(parent))

    return Fault(f"SIGKILL to the ssh session on {name}", inflict)


def cable_out(link: str, name: str, seconds: float | None, *options: str) -> Fault:
    """Pull a cable out and put it back after some seconds; None: after the ring has stopped."""

    def inflict(front: Front) -> None:
        count = front.errors.count(RECONNECTING)
        front.hosts.cut(name, link)
        if seconds is None:
            front.wait_for_message(RECONNECTING, count + 1)
            time.sleep(2)
        else:
            time.sleep(seconds)
        front.hosts.plug_in(name, link)

    cable = {"tb": "Thunderbolt", "lan": "Ethernet (ssh)"}[link]
    end = "put back after the ring stopped" if seconds is None else f"put back after {seconds:g} s"
    return Fault(f"{cable} cable of {name} pulled out, {end}", inflict, options, is_noticed=seconds is None)


def power_cycled(name: str, *options: str) -> Fault:
    """Switch a host off, and on again once the front noticed."""

    def inflict(front: Front) -> None:
        count = front.errors.count(RECONNECTING)
        front.hosts.power_off(name)
        front.wait_for_message(RECONNECTING, count + 1)
        assert list((front.hosts.folder / name / "tmp").iterdir())  # of the lost rank, to be removed by the next one
        front.hosts.boot(name, keeps_temporary_files=True)

    return Fault(f"{name} off, on again once the front noticed", inflict, options)


def power_off(name: str, *options: str) -> Fault:
    """Switch a host off for good."""
    return Fault(f"{name} off for good", lambda front: front.hosts.power_off(name), options, ends=True)


def front_ends(number: signal.Signals) -> Fault:
    """Send a signal to the front."""
    name = f"{number.name} to the front"
    return Fault(name, lambda front: front.process.send_signal(number), is_noticed=False, ends=True)


def front_killed_while_cut_off(name: str) -> Fault:
    """Cut a host off the network and kill the front, so that no message can reach the host."""

    def inflict(front: Front) -> None:
        front.hosts.cut(name)
        front.process.kill()

    return Fault(f"SIGKILL to the front, {name} cut off", inflict, is_noticed=False, ends=True)


@dataclass(frozen=True)
class Effect:
    """Measured effect of a fault.

    Args:
        fault: the fault.
        noticed_s: seconds from the fault to the front's message; None without one.
        next_text_s: seconds from the fault to the next text of the answer; None without one.
    """

    fault: Fault
    noticed_s: float | None
    next_text_s: float | None


@dataclass(frozen=True)
class Outcome:
    """Result of an answer with faults.

    Args:
        effects: effect of each fault.
        text: standard output.
        errors: standard error.
        code: exit code.
        end_s: seconds from the last fault to the exit of the front.
        gone_s: seconds from the exit of the front until no host had leftovers of its rank.
        left: leftover processes and files.
    """

    effects: tuple[Effect, ...]
    text: str
    errors: str
    code: int
    end_s: float
    gone_s: float
    left: list[str]


def answer(hosts: Hosts, where: Sequence[str], faults: Sequence[Fault], *options: str, program: str = MAIN) -> Outcome:
    """Run one answer on the hosts, with faults one after the other.

    Args:
        hosts: healthy test hosts.
        where: options of `launch` that name the hosts.
        faults: faults in order; each one starts after the answer has continued after the previous one.
        options: options of `chat`.
        program: Python code of the front.
    """
    ours = [option for fault in faults for option in fault.options]
    front = Front(hosts, *where, *ours, *QUESTION, *options, code=program)
    begins: list[float] = []
    num_continued, length = 0, 0
    try:
        for fault in faults:
            front.wait_for_text(length + MIDDLE)
            begins.append(time.monotonic())
            fault.inflict(front)
            if fault.is_noticed and not fault.ends:
                num_continued += 1
                front.wait_for_message(CONTINUES, num_continued)
            length = len(front.text)
        code = front.end()
    finally:
        front.end(0 if front.process.poll() is None else LIMIT_S)
    ended = time.monotonic()
    left = wait_until_gone(hosts)
    ends = [*begins, float("inf")][1:] if begins else []
    effects = tuple(_effect(front, fault, begin, end) for fault, begin, end in zip(faults, begins, ends, strict=True))
    last = begins[-1] if begins else ended
    return Outcome(effects, front.text, front.errors, code, ended - last, time.monotonic() - ended, left)


def wait_until_gone(hosts: Hosts, limit_s: float = 30) -> list[str]:
    """Wait until no host has leftovers; return those that remain at the limit."""
    end = time.monotonic() + limit_s
    while (left := [f"{name}: {each}" for name in hosts.names for each in hosts.left(name)]) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _effect(front: Front, fault: Fault, begin: float, end: float) -> Effect:
    messages = [(at, line) for at, line in front.err if begin <= at < end]
    noticed = next((at for at, line in messages if RECONNECTING in line or ERROR in line), None)
    texts = [at for at, _ in front.out if begin <= at < end]
    if noticed is not None:
        continued_at = next((at for at, line in messages if CONTINUES in line), float("inf"))
        after = next((at for at in texts if at >= continued_at), None)
    elif fault.ends or not texts:
        after = None
    else:  # no message: take the end of the longest pause
        _, after = max(zip((b - a for a, b in zip([begin, *texts], texts, strict=False)), texts, strict=False))
    return Effect(fault, *(None if at is None else at - begin for at in (noticed, after)))


FAULTS = (
    *(signalled(signal.SIGKILL, name) for name in ("mac-a", "mac-b")),
    *(signalled(signal.SIGSTOP, name) for name in ("mac-a", "mac-b")),
    guard_killed("mac-b"),
    session_killed("mac-b"),
    cable_out("tb", "mac-b", 3),
    cable_out("lan", "mac-b", 3),
    cable_out("tb", "mac-b", None),
    cable_out("lan", "mac-b", None, "--limit", "3"),  # rank 0 goes on meanwhile, and may finish the answer in 10 s
    power_cycled("mac-b"),
    power_off("mac-b", "--restarts", "1"),
    *(front_ends(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)),
    front_killed_while_cut_off("mac-b"),
)
"""Faults of the table, with the default limits."""


def main() -> None:
    """Print the table."""
    if reason := missing_requirement():
        sys.exit(reason)
    expected = run_without_faults()
    print("| fault | noticed after | next text after | text | exit code | front ended after | nothing left after |")
    print("| --- | --: | --: | --- | --: | --: | --: |", flush=True)
    with Hosts() as hosts:
        where = ("--hostfile", write_hostfile(hosts, hosts.folder / "two.json"))
        for fault in FAULTS:
            print(_row(answer(hosts, where, [fault]), expected), flush=True)
            hosts.heal()


def _row(outcome: Outcome, expected: str) -> str:
    [effect] = outcome.effects
    begins = "a prefix" if expected.startswith(outcome.text.rstrip("\n")) else "**wrong**"
    cells = [
        effect.fault.name,
        _seconds(effect.noticed_s),
        _seconds(effect.next_text_s),
        "equal" if outcome.text == expected else begins,
        str(outcome.code),
        _seconds(outcome.end_s) if effect.fault.ends else "",
        f"**{len(outcome.left)} left**" if outcome.left else _seconds(outcome.gone_s),
    ]
    return f"| {' | '.join(cells)} |"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


if __name__ == "__main__":
    main()
