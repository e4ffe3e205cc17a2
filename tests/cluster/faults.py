"""What becomes of an answer when a rank, a cable, a host or the front is lost while it streams in.

`python -m tests.cluster.faults` prints a table of all faults, each in an answer of its own, on two hosts over real ssh.
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

from tests.cluster.hosts import ROOT, Hosts, why_not

QUESTION = ("chat", "kimi-mini", "-t", "0", "-p", "Draw a pelican")
"""Answered with 283 tokens, 559 characters."""

MIDDLE = 100
"""Characters of an answer, or of what follows on the fault before, after which the next fault comes."""

AGAIN, GOES_ON, ERROR = "reconnecting in", "the answer continues", "error: "
"""What the front says on stderr."""

LIMIT_S = 120.0
"""For anything to come, on a machine that is busy."""

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


def undisturbed(*options: str) -> str:
    """The answer of one process on this machine."""
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
    """`kimi-mlx launch` in a process; what it writes, and when.

    Args:
        hosts: where `ssh` leads.
        arguments: of `launch`.
        code: of the process.
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
        """Pieces, each with its time."""
        self.err: list[tuple[float, str]] = []
        """Lines, each with its time."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._threads = [
            threading.Thread(target=_listen, args=each, daemon=True)
            for each in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def text(self) -> str:
        """Standard output until now."""
        return "".join(piece for _, piece in self.out.copy())

    @property
    def errors(self) -> str:
        """Standard error until now."""
        return "".join(line for _, line in self.err.copy())

    def wait(self, is_so: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Wait until something is so; an error if the process ends first, or does not get there."""
        end = time.monotonic() + limit_s
        while not is_so():
            if self.process.poll() is not None or time.monotonic() > end:
                self._join()
                if is_so():
                    return
                raise AssertionError(f"{self.process.poll()}: {self.text!r}, {self.errors}")
            time.sleep(0.01)

    def wait_for_text(self, characters: int) -> None:
        """Until standard output has so many."""
        self.wait(lambda: len(self.text) >= characters)

    def wait_for_word(self, word: str, times: int = 1) -> None:
        """Until standard error has it, so many times."""
        self.wait(lambda: self.errors.count(word) >= times)

    def end(self, limit_s: float = LIMIT_S) -> int:
        """Wait for the end; the exit code."""
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


def _listen(pipe: IO[bytes], heard: list[tuple[float, str]]) -> None:
    with pipe:
        for piece in iter(lambda: os.read(pipe.fileno(), 1 << 16), b""):
            heard.append((time.monotonic(), piece.decode()))


def rank_pid(hosts: Hosts, name: str, module: str = "kimi_mlx.rank.main") -> int | None:
    """The process id of a rank on its host; not of its guard."""
    for line in hosts.run(name, "ps", "-A", "-ww", "-o", "pid=,args=").splitlines():
        if f"from {module} import main" in line and "cluster.ring.guard" not in line:
            return int(line.split()[0])
    return None


def guard_pid(hosts: Hosts, name: str) -> int:
    """The process id of a rank's guard on its host."""
    lines = hosts.run(name, "ps", "-A", "-ww", "-o", "pid=,args=").splitlines()
    return next(int(line.split()[0]) for line in lines if "from kimi_mlx.cluster.ring.guard import main" in line)


def send(hosts: Hosts, name: str, number: signal.Signals, pid: int | None) -> None:
    """Send a signal to a process on a host."""
    assert pid is not None
    hosts.run(name, "kill", f"-{number.value}", str(pid))


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in mid-answer.

    Args:
        name: in words.
        inflict: does it, and mends it if that is part of it.
        options: of `launch` that it is tried with.
        is_noticed: whether the ring is given up then.
        ends: whether there is no answer in the end, but an error or a signal.
    """

    name: str
    inflict: Callable[[Front], None]
    options: tuple[str, ...] = ()
    is_noticed: bool = True
    ends: bool = False


def signalled(number: signal.Signals, name: str, *options: str) -> Fault:
    """A signal to the rank on a host."""

    def inflict(front: Front) -> None:
        send(front.hosts, name, number, rank_pid(front.hosts, name))

    return Fault(f"{number.name} to the rank on {name}", inflict, options)


def guard_killed(name: str) -> Fault:
    """The guard of the rank on a host is killed."""

    def inflict(front: Front) -> None:
        send(front.hosts, name, signal.SIGKILL, guard_pid(front.hosts, name))

    return Fault(f"SIGKILL to the guard on {name}", inflict)


def session_killed(name: str) -> Fault:
    """The SSH server's process of the session is killed; the server itself goes on."""

    def inflict(front: Front) -> None:
        parent = front.hosts.run(name, "ps", "-o", "ppid=", "-p", str(guard_pid(front.hosts, name))).strip()
        send(front.hosts, name, signal.SIGKILL, int(parent))

    return Fault(f"SIGKILL to the ssh session on {name}", inflict)


def cable_out(link: str, name: str, seconds: float | None, *options: str) -> Fault:
    """A cable is pulled out, and put back after some seconds; None: when the ring has been given up."""

    def inflict(front: Front) -> None:
        noted = front.errors.count(AGAIN)
        front.hosts.cut(name, link)
        if seconds is None:
            front.wait_for_word(AGAIN, noted + 1)
            time.sleep(2)
        else:
            time.sleep(seconds)
        front.hosts.plug_in(name, link)

    what = {"tb": "Thunderbolt", "lan": "Ethernet (ssh)"}[link]
    how = "put back after the ring was given up" if seconds is None else f"put back after {seconds:g} s"
    return Fault(f"{what} cable of {name} pulled out, {how}", inflict, options, is_noticed=seconds is None)


def power_cycled(name: str, *options: str) -> Fault:
    """A host goes off, and is switched on again when that was noticed."""

    def inflict(front: Front) -> None:
        noted = front.errors.count(AGAIN)
        front.hosts.power_off(name)
        front.wait_for_word(AGAIN, noted + 1)
        front.hosts.boot(name)

    return Fault(f"{name} off, on again when that was noticed", inflict, options)


def power_off(name: str, *options: str) -> Fault:
    """A host goes off for good."""
    return Fault(f"{name} off for good", lambda front: front.hosts.power_off(name), options, ends=True)


def front_ends(number: signal.Signals) -> Fault:
    """A signal to the front."""
    name = f"{number.name} to the front"
    return Fault(name, lambda front: front.process.send_signal(number), is_noticed=False, ends=True)


def front_killed_in_the_dark(name: str) -> Fault:
    """A host is cut off from all others, and the front is killed: nobody can tell it."""

    def inflict(front: Front) -> None:
        front.hosts.cut(name)
        front.process.kill()

    return Fault(f"SIGKILL to the front, {name} cut off", inflict, is_noticed=False, ends=True)


@dataclass(frozen=True)
class Effect:
    """What came of a fault.

    Args:
        fault: which.
        noticed_s: from it until the front said so; None if it did not.
        next_text_s: from it until the answer went on; None if it did not.
    """

    fault: Fault
    noticed_s: float | None
    next_text_s: float | None


@dataclass(frozen=True)
class Outcome:
    """What became of an answer.

    Args:
        effects: of each fault.
        text: standard output.
        errors: standard error.
        code: exit code.
        end_s: from the last fault until the front had ended.
        gone_s: from the end of the front until nothing was left of the ranks on any host.
        left: what was left there all the same: processes and files.
    """

    effects: tuple[Effect, ...]
    text: str
    errors: str
    code: int
    end_s: float
    gone_s: float
    left: list[str]


def answer(hosts: Hosts, where: Sequence[str], faults: Sequence[Fault], *options: str, program: str = MAIN) -> Outcome:
    """Run one answer over the hosts, with faults one after the other, each in the midst of it.

    Args:
        hosts: that are well.
        where: options of `launch` that name them.
        faults: each comes when the answer has gone on after the one before.
        options: of `chat`.
        program: of the front.
    """
    ours = [option for fault in faults for option in fault.options]
    front = Front(hosts, *where, *ours, *QUESTION, *options, code=program)
    begins: list[float] = []
    goes_on, length = 0, 0
    try:
        for fault in faults:
            front.wait_for_text(length + MIDDLE)
            begins.append(time.monotonic())
            fault.inflict(front)
            if fault.is_noticed and not fault.ends:
                goes_on += 1
                front.wait_for_word(GOES_ON, goes_on)
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
    """Wait until nothing is left on any host; what is, after so long."""
    end = time.monotonic() + limit_s
    while (left := [f"{name}: {each}" for name in hosts.names for each in hosts.left(name)]) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _effect(front: Front, fault: Fault, begin: float, end: float) -> Effect:
    said = [(at, line) for at, line in front.err if begin <= at < end]
    noticed = next((at for at, line in said if AGAIN in line or ERROR in line), None)
    texts = [at for at, _ in front.out if begin <= at < end]
    if noticed is not None:
        going_on = next((at for at, line in said if GOES_ON in line), float("inf"))
        after = next((at for at in texts if at >= going_on), None)
    elif fault.ends or not texts:
        after = None
    else:  # the end of the longest pause
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
    cable_out("lan", "mac-b", None),
    power_cycled("mac-b"),
    power_off("mac-b", "--restarts", "1"),
    *(front_ends(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)),
    front_killed_in_the_dark("mac-b"),
)
"""All of the table, with the limits that users have."""


def main() -> None:
    """Print the table."""
    if reason := why_not():
        sys.exit(reason)
    expected = undisturbed()
    print("| fault | noticed after | next text after | text | exit code | front ended after | nothing left after |")
    print("| --- | --: | --: | --- | --: | --: | --: |", flush=True)
    with Hosts() as hosts:
        where = ("--hostfile", write_hostfile(hosts, hosts.folder / "two.json"))
        for fault in FAULTS:
            print(_row(answer(hosts, where, [fault]), expected), flush=True)
            hosts.heal()


def _row(outcome: Outcome, expected: str) -> str:
    [effect] = outcome.effects
    begins = "the beginning of it" if expected.startswith(outcome.text.rstrip("\n")) else "**wrong**"
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
