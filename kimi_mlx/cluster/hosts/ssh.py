"""Running things on hosts, through the system's ssh with the user's own configuration; here, without ssh.

A script runs in `sh`; it reaches the host on standard input, so that no login shell there ever reads it.
"""

from __future__ import annotations

import contextlib
import getpass
import ipaddress
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from kimi_mlx.errors import SshError, UsageError

CONNECT_TIMEOUT_S = 10
"""How long ssh may take to connect."""

ALIVE_INTERVAL_S = 5
"""How often ssh asks a silent host whether it is there; after three questions without an answer it gives up."""

END_PATIENCE_S = 2.0
"""How long a client may take to end and to close its pipes when its time is over."""

SSH_FAILED = 255
"""Exit code of ssh for its own failures."""

_FORBIDDEN_IN_HOST = frozenset("'\"`$\\;&<>|(){}*?!")


@dataclass(frozen=True)
class ScriptResult:
    """What a host said.

    Args:
        host: as the user names it.
        exit_code: of the script, or 255 of ssh itself; None if its time was over.
        stdout: as text; bytes that are no UTF-8 are replaced.
        stderr: the same; ssh's own words are in it.
        seconds: how long it took in all, connecting included.
        started: when we asked, by the clock of this machine (seconds since 1970).
    """

    host: str
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float
    started: float = 0.0

    @property
    def is_ok(self) -> bool:
        """Whether the script ran and succeeded."""
        return self.exit_code == 0


def check_host(host: str) -> str:
    """Return the name of a host, if ssh can take it for nothing else.

    Raises:
        UsageError: empty, like an option, or with blanks or characters that mean something to a shell: the user's
            configuration may hand the name to one (`ProxyCommand ... %h`).
    """
    is_plain = host.isprintable() and not any(letter.isspace() or letter in _FORBIDDEN_IN_HOST for letter in host)
    if is_plain and all(part and not part.startswith("-") for part in host.split("@")):
        return host
    raise UsageError(
        f"`{host}` cannot be the name of a host",
        hint="give a name that `ssh NAME` understands: one of ~/.ssh/config, `mac-b.local`, `user@10.0.0.2`",
    )


def quote_argument(word: str) -> str:
    """One word for the login shell of a host: sh, bash, zsh and fish read it alike."""
    # fish, unlike the others, knows escapes between single quotes: a backslash goes between double ones.
    return shlex.quote(word).replace("\\", "'\"\\\\\"'")


def ssh_command(
    host: str,
    remote: Sequence[str],
    *,
    connect_timeout_s: int = CONNECT_TIMEOUT_S,
    alive_interval_s: int = ALIVE_INTERVAL_S,
    options: Sequence[str] = (),
) -> list[str]:
    """The command that runs a command on a host; it asks for nothing and has no terminal there.

    Args:
        host: as in check_host.
        remote: the command there and its arguments, any text but NUL.
        connect_timeout_s: after which an unreachable host is given up.
        alive_interval_s: a host that falls silent is given up after three times so long.
        options: of ssh, which come first and so overrule ours, such as `-o`, `ClearAllForwardings=no`.

    Raises:
        UsageError: not the name of a host.
    """
    settings = {
        "BatchMode": "yes",
        "ConnectTimeout": str(connect_timeout_s),
        "ServerAliveInterval": str(alive_interval_s),
        "ServerAliveCountMax": "2",
        # The user's configuration may say otherwise, for sessions in which people type.
        "LogLevel": "INFO",  # at ERROR ssh ends without a word when a host falls silent
        "RemoteCommand": "none",
        "ClearAllForwardings": "yes",
    }
    ours = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    # ssh sends its arguments joined by blanks: one argument, quoted by us, arrives as it is.
    return ["ssh", *options, *ours, "-T", "--", check_host(host), " ".join(map(quote_argument, remote))]


def script_command(script: bytes) -> list[str]:
    """A command that runs the script which is the start of its input; the rest is the script's own input.

    Not `sh -s`: some shells read ahead and take what is meant for the script. `dd` of one byte at a time never does.
    """
    return ["sh", "-c", f'eval "$(dd bs=1 count={len(script)} 2>/dev/null)"']


def command_on(host: str, command: Sequence[str]) -> tuple[list[str], bytes]:
    """How a command is started on a host, with our pipes as its own.

    Returns:
        What to run here, and what its input must begin with; the command itself and nothing on this machine.
    """
    if is_local(host):
        return list(command), b""
    script = f"exec {' '.join(map(quote_argument, command))}".encode()
    return ssh_command(host, script_command(script)), script


def is_local(host: str) -> bool:
    """Whether a host is this machine, so that no ssh is needed: by name or address, and as the same user."""
    user, _, name = host.rpartition("@")
    if user and user != _own_user():
        return False
    name = name.strip("[]").lower().rstrip(".")
    own = socket.gethostname().lower().rstrip(".")
    short = own.split(".")[0]
    return name in {"localhost", own, short, f"{short}.local"} or _is_own_address(name)


def run_script(host: str, script: str, timeout_s: float, stdin_extra: bytes = b"") -> ScriptResult:
    """Run a script in a host's `sh`, or in ours if the host is this machine.

    When the time is over, the client (here: the script and what it started) is ended, and the answer holds what came
    until then. A script on another host is then cut off from its terminal and pipes, but not ended.

    Args:
        host: as in check_host.
        script: for a POSIX shell.
        timeout_s: for everything, connecting included.
        stdin_extra: the script's standard input.

    Raises:
        UsageError: not the name of a host.
        SshError: there is no ssh on this machine.
    """
    return _run([host], script, timeout_s, stdin_extra)[host]


def run_everywhere(hosts: Iterable[str], script: str, timeout_s: float) -> dict[str, ScriptResult]:
    """Run a script on all hosts at once; one answer a host, in the order of `hosts`."""
    return _run(list(dict.fromkeys(hosts)), script, timeout_s, b"")


def _run(hosts: Sequence[str], script: str, timeout_s: float, stdin_extra: bytes) -> dict[str, ScriptResult]:
    starts: list[Future[_Running]] = []
    try:
        with ThreadPoolExecutor(max(len(hosts), 1)) as pool:
            try:
                # In threads, where an interrupt never arrives: it cannot come between a client and our knowing of it.
                starts += [pool.submit(_start, host, script) for host in hosts]
                running = [start.result() for start in starts]
                waiting = [pool.submit(_finish, each, timeout_s, stdin_extra) for each in running]
                return {host: answer.result() for host, answer in zip(hosts, waiting, strict=True)}
            except BaseException:
                for each in _started(starts):
                    _end(each.process)  # before the pool waits for its threads
                raise
    except BaseException:
        for each in _started(starts):
            _close(each.process)
        raise


def _started(starts: Iterable[Future[_Running]]) -> list[_Running]:
    return [start.result() for start in starts if start.exception() is None]


@dataclass(frozen=True)
class _Running:
    host: str
    script: bytes
    process: subprocess.Popen[bytes]
    started: float
    begin: float


def _start(host: str, script: str) -> _Running:
    data = script.encode()
    command = script_command(data)
    if not is_local(check_host(host)):
        command = ssh_command(host, command)
    begin, started = time.monotonic(), time.time()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a group of its own, to be ended as a whole
        )
    except FileNotFoundError as error:
        raise SshError(f"`{command[0]}` is not installed on this machine", hint="install OpenSSH's client") from error
    return _Running(host, data, process, started, begin)


def _finish(running: _Running, timeout_s: float, stdin_extra: bytes) -> ScriptResult:
    process = running.process
    try:
        out, err = process.communicate(running.script + stdin_extra, timeout_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        code = None
        _end(process)
        out, err = _rest(process)
    text, errors = out.decode(errors="replace"), err.decode(errors="replace")
    return ScriptResult(running.host, code, text, errors, time.monotonic() - running.begin, running.started)


def _rest(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """What an ended process has said; not waiting for a descendant that has left its group and holds the pipes."""
    try:
        return process.communicate(timeout=END_PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        _close(process)
        return error.stdout or b"", error.stderr or b""


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and its group: ssh takes leave of its host if it is asked kindly."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_PATIENCE_S)


def _own_user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user, no variable that names one
        return None


def _is_own_address(name: str) -> bool:
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    if address.is_unspecified or address.is_multicast:
        return False
    try:
        family, _, _, _, place = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(place)  # only an own address can be bound
    except OSError:
        return False
    return True
