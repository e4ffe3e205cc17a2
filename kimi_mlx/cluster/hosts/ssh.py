"""Run scripts and commands on hosts, through the system's ssh with the user's configuration; locally, without ssh.

A script runs in `sh`. It is sent on standard input, so that the login shell of the host never parses it, and what that
shell prints is separated from the script's own output (kimi_mlx.cluster.hosts.marked_script).
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

from kimi_mlx.cluster.hosts.marked_script import MarkedScript, mark_script, split_at_mark
from kimi_mlx.errors import SshError, UsageError

CONNECT_TIMEOUT_S = 10
"""Time limit for ssh to connect."""

ALIVE_INTERVAL_S = 5
"""Interval of ssh's keep-alive messages to a silent host; ssh gives up after three without an answer."""

END_PATIENCE_S = 2.0
"""Time for a client to exit and to close its pipes after a signal."""

POLL_INTERVAL_S = 0.5
"""Interval at which a client that does not exit is checked for the end of its script."""

SSH_FAILED = 255
"""Exit code of ssh for its own failures."""

_FORBIDDEN_IN_HOST = frozenset("'\"`$\\;&<>|(){}*?!")


@dataclass(frozen=True)
class ScriptResult:
    """Result of a script on a host.

    Args:
        host: host as the user names it.
        exit_code: exit code of the script, or 255 if ssh itself failed; None after a timeout.
        stdout: standard output; bytes that are not UTF-8 are replaced.
        stderr: standard error, with later messages of ssh itself; bytes that are not UTF-8 are replaced.
        seconds: duration, including the connection.
        started_at: start by the clock of this machine, in seconds since 1970.
        has_started: whether the script began to run. If not, stderr has the messages of ssh and of the login shell.
        greeting: what the login shell printed to standard output before the script.
    """

    host: str
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float
    started_at: float = 0.0
    has_started: bool = True
    greeting: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether the script succeeded."""
        return self.exit_code == 0 and self.has_started


def check_host(host: str) -> str:
    """Return a host name after checking that ssh cannot misread it.

    Raises:
        UsageError: the name is empty, looks like an option, or has blanks or shell characters: the user's
            configuration may pass it to a shell (`ProxyCommand ... %h`).
    """
    is_safe = host.isprintable() and not any(letter.isspace() or letter in _FORBIDDEN_IN_HOST for letter in host)
    if is_safe and all(part and not part.startswith("-") for part in host.split("@")):
        return host
    raise UsageError(
        f"`{host}` is not a valid host name",
        hint="give a name that `ssh NAME` understands: one of ~/.ssh/config, `mac-b.local`, `user@10.0.0.2`",
    )


def quote_argument(argument: str) -> str:
    """Quote one argument for the login shell of a host; sh, bash, zsh and fish read it the same way."""
    # fish, unlike the others, reads escapes in single quotes, so a backslash is put in double quotes.
    return shlex.quote(argument).replace("\\", "'\"\\\\\"'")


def ssh_command(
    host: str,
    remote: Sequence[str],
    *,
    connect_timeout_s: int = CONNECT_TIMEOUT_S,
    alive_interval_s: int = ALIVE_INTERVAL_S,
    options: Sequence[str] = (),
) -> list[str]:
    """Return the ssh command line that runs a command on a host, without prompts and without a terminal.

    Args:
        host: host name as in check_host.
        remote: remote command and its arguments; any text without NUL.
        connect_timeout_s: time limit for the connection.
        alive_interval_s: interval of keep-alive messages; ssh gives up after three without an answer.
        options: additional options of ssh, such as `-o`, `ClearAllForwardings=no`; they precede and override ours.

    Raises:
        UsageError: the host name is not valid.
    """
    settings = {
        "BatchMode": "yes",
        "ConnectTimeout": str(connect_timeout_s),
        "ServerAliveInterval": str(alive_interval_s),
        "ServerAliveCountMax": "2",
        # These override settings that the user's configuration has for interactive sessions.
        "LogLevel": "INFO",  # at ERROR, ssh exits without a message when a host stops responding
        "RemoteCommand": "none",
        "ClearAllForwardings": "yes",
    }
    ours = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    # ssh joins its arguments with blanks, so we send a single argument that is already quoted.
    return ["ssh", *options, *ours, "-T", "--", check_host(host), " ".join(map(quote_argument, remote))]


def script_on(host: str, script: str, *, has_end_mark: bool = False) -> MarkedScript:
    """Return a script for a host; its command is the local command line, with ssh if the host is another machine.

    Args:
        host: host name as in check_host.
        script: script for a POSIX shell.
        has_end_mark: whether to print a mark after the output too.

    Raises:
        UsageError: the host name is not valid.
    """
    if is_local(check_host(host)):
        return mark_script(script, is_remote=False, has_end_mark=has_end_mark)
    marked = mark_script(script, is_remote=True, has_end_mark=has_end_mark)
    return replace(marked, command=ssh_command(host, marked.command))


def command_on(host: str, command: Sequence[str]) -> MarkedScript:
    """Return how to start a command on a host, connected to our pipes; without a mark if the host is this machine."""
    if is_local(host):
        return MarkedScript(command, b"", b"")
    return script_on(host, f"exec {shlex.join(command)}")


def is_local(host: str) -> bool:
    """Return whether a host is this machine (by name or address) and the same user, so that ssh is not needed."""
    user, _, name = host.rpartition("@")
    if user and user != _own_user():
        return False
    name = name.strip("[]").lower().rstrip(".")
    own = socket.gethostname().lower().rstrip(".")
    short = own.split(".")[0]
    return name in {"localhost", own, short, f"{short}.local"} or _is_own_address(name)


def run_script(host: str, script: str, timeout_s: float, stdin_extra: bytes = b"") -> ScriptResult:
    """Run a script in a host's `sh`, or in ours if the host is this machine.

    The result is complete at the end of the script, even if a process still holds its output open: a job that a
    start-up file started. After the timeout, the client (locally, the script and its children) is stopped, and the
    result has the output so far. A script on another host loses its pipes, but is not stopped.

    Args:
        host: host name as in check_host.
        script: script for a POSIX shell.
        timeout_s: time limit, including the connection.
        stdin_extra: standard input of the script.

    Raises:
        UsageError: the host name is not valid.
        SshError: ssh is not installed on this machine.
    """
    return _run([host], script, timeout_s, stdin_extra)[host]


def run_everywhere(
    hosts: Iterable[str],
    script: str,
    timeout_s: float,
    on_waiting: Callable[[Sequence[str]], None] = lambda hosts: None,
) -> dict[str, ScriptResult]:
    """Run a script on all hosts at once; return host -> result, in the order of `hosts`.

    Args:
        hosts: hosts.
        script: the script.
        timeout_s: time limit of each host.
        on_waiting: callback for the hosts that have not answered yet, each time that one has.
    """
    return _run(list(dict.fromkeys(hosts)), script, timeout_s, b"", on_waiting)


def _run(
    hosts: Sequence[str],
    script: str,
    timeout_s: float,
    stdin_extra: bytes,
    on_waiting: Callable[[Sequence[str]], None] = lambda hosts: None,
) -> dict[str, ScriptResult]:
    clients: list[_RunningScript] = []

    def start(host: str) -> _RunningScript:
        # Threads never receive KeyboardInterrupt, so every client that a thread has started gets into the list.
        client = _start(host, script)
        clients.append(client)
        return client

    try:
        with ThreadPoolExecutor(max(len(hosts), 1)) as pool:
            started = list(pool.map(start, hosts))
        with ThreadPoolExecutor(max(len(hosts), 1)) as pool:
            try:
                results = [pool.submit(_finish, client, timeout_s, stdin_extra) for client in started]
                for _ in as_completed(results):
                    on_waiting([host for host, result in zip(hosts, results, strict=True) if not result.done()])
                return {host: result.result() for host, result in zip(hosts, results, strict=True)}
            except BaseException:
                for client in clients:
                    _end(client.process)  # before the pool waits for its threads
                raise
    except BaseException:
        for client in clients:
            _end(client.process)
            _close(client.process)
        raise


@dataclass(frozen=True)
class _RunningScript:
    host: str
    script: MarkedScript
    process: subprocess.Popen[bytes]
    started_at: float
    monotonic_start: float


def _start(host: str, script: str) -> _RunningScript:
    marked = script_on(host, script, has_end_mark=True)
    monotonic_start, started_at = time.monotonic(), time.time()
    try:
        process = subprocess.Popen(
            marked.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a separate process group, which can be stopped as a whole
        )
    except FileNotFoundError as error:
        name = marked.command[0]
        raise SshError(f"`{name}` is not installed on this machine", hint="install the OpenSSH client") from error
    return _RunningScript(host, marked, process, started_at, monotonic_start)


def _finish(running_script: _RunningScript, timeout_s: float, stdin_extra: bytes) -> ScriptResult:
    process, mark = running_script.process, running_script.script.mark
    out, err, code = _communicate(process, mark, running_script.script.data + stdin_extra, timeout_s)
    stdout, stderr = split_at_mark(out, mark), split_at_mark(err, mark)
    return ScriptResult(
        running_script.host,
        code if stdout.exit_code is None else stdout.exit_code,
        (stdout.own or b"").decode(errors="replace"),
        (stderr.before if stderr.own is None else stderr.own).decode(errors="replace"),
        time.monotonic() - running_script.monotonic_start,
        running_script.started_at,
        has_started=stdout.own is not None,
        greeting=stdout.before.decode(errors="replace"),
    )


def _communicate(
    process: subprocess.Popen[bytes], mark: bytes, data: bytes, timeout_s: float
) -> tuple[bytes, bytes, int | None]:
    """Write the input and read the output, until the client exits, the script has ended, or the time is over.

    Returns:
        Standard output, standard error, and the exit code of the client; None if it was stopped.
    """
    end = time.monotonic() + timeout_s
    unsent: bytes | None = data
    while True:
        try:
            out, err = process.communicate(unsent, max(min(POLL_INTERVAL_S, end - time.monotonic()), 0))
        except subprocess.TimeoutExpired as error:
            unsent = None  # `communicate` goes on with what it was given first
            outputs = (error.stdout or b"", error.stderr or b"")
            has_ended = all(split_at_mark(output, mark).exit_code is not None for output in outputs)
            if has_ended or time.monotonic() >= end:
                _end(process)
                return *_rest(process), None
        else:
            return out, err, process.returncode


def _rest(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """Return the output of a stopped process, without waiting for descendants that hold the pipes."""
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
    """Stop a running process and its group; SIGTERM first lets ssh close its connection."""
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
    except (KeyError, OSError):  # unknown user id, and no variable with the name
        return None


def _is_own_address(name: str) -> bool:
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    if address.is_unspecified or address.is_multicast:
        return False
    try:
        family, _, _, _, address_info = socket.getaddrinfo(
            name, 0, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
        )[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address_info)  # only an address of this machine can be bound
    except OSError:
        return False
    return True
