"""Explain failures of ssh: the cause, and the command that fixes it.

Source: messages of OpenSSH 9.2 (observed) and of the 9.x that macOS ships (from its source).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from kimi_mlx.cluster.hosts.ssh import SSH_FAILED, ScriptResult
from kimi_mlx.errors import SshError

KEPT_LINES = 6
"""Number of last lines of standard error that an error message quotes."""


@dataclass(frozen=True)
class _Cause:
    """Cause of a failure that ssh reports.

    Args:
        pattern: regular expression searched in standard error, ignoring case.
        message: template of the message, with `{host}` for the quoted name.
        remedy: function of the host's name, quoted for a shell, and standard error; returns the hint.
    """

    pattern: str
    message: str
    remedy: Callable[[str, str], str]


def _remove_old_key(host: str, text: str) -> str:
    names = re.findall(r"Host key for (\S+) has changed", text) or [host]
    files = re.findall(r"Offending .* key in (.+):\d+\s*$", text, re.MULTILINE)
    remove_key = f"ssh-keygen -R {shlex.quote(names[0])}" + (f" -f {shlex.quote(files[0])}" if files else "")
    return f"if it was reinstalled or replaced: `{remove_key}`, then `ssh {host}` once; if not, check the address"


def _accept_key(host: str, _: str) -> str:
    return f"connect once by hand, compare the fingerprint and answer yes: `ssh {host}`"


def _copy_key(host: str, _: str) -> str:
    return f"install your key there: `ssh-copy-id {host}` (if you have no key, first `ssh-keygen -t ed25519`)"


def _enable_remote_login(_: str, __: str) -> str:
    return (
        "turn on Remote Login there: System Settings > General > Sharing, or run on that Mac "
        "`sudo systemsetup -setremotelogin on` (Linux: `sudo systemctl enable --now ssh`)"
    )


def _check_host_is_up(host: str, _: str) -> str:
    return (
        f"check that it is on, awake and on this network: `ping {host}`; on a Mac also allow this terminal in "
        "System Settings > Privacy & Security > Local Network"
    )


def _check_name(host: str, _: str) -> str:
    local = "" if host.endswith(".local") else f"`{host}.local`, "
    return f"check the name, try {local}the address, or add `Host {host}` to ~/.ssh/config"


def _debug_ssh(host: str, _: str) -> str:
    return f"run `ssh -v {host} true` to see more"


def _fix_config(_: str, __: str) -> str:
    return "fix the lines that ssh names"


# The first match counts: a changed key is also a failed verification.
_CAUSES = (
    _Cause(
        r"host identification has changed|host key for \S+ has changed",
        "{host} has a different host key than before",
        _remove_old_key,
    ),
    _Cause(r"host key is known for|host key verification failed", "{host} is not known to ssh yet", _accept_key),
    _Cause(r"permission denied|too many authentication failures", "{host} refuses the login", _copy_key),
    _Cause(r"connection refused", "{host} refuses connections: no SSH server is running there", _enable_remote_login),
    _Cause(r"could not resolve hostname", "the name {host} cannot be resolved", _check_name),
    _Cause(r"timeout, server \S+ not responding|broken pipe", "{host} stopped responding", _check_host_is_up),
    _Cause(
        r"no route to host|network is unreachable|host is down|timed out|can't assign requested address",
        "{host} cannot be reached",
        _check_host_is_up,
    ),
    _Cause(
        r"bad configuration option|terminating, \d+ bad",
        "ssh cannot connect to {host}: ~/.ssh/config has an error",
        _fix_config,
    ),
    _Cause(
        r"connection (closed|reset)|kex_exchange_identification",
        "{host} closes the connection before login",
        _debug_ssh,
    ),
)


def explain_ssh(result: ScriptResult) -> SshError:
    """Return the error for a failed script: the cause, the last lines of standard error, and a hint.

    Args:
        result: result with an exit code other than 0.
    """
    host, name = shlex.quote(result.host), f"`{result.host}`"
    if result.exit_code == SSH_FAILED:
        for cause in _CAUSES:
            if re.search(cause.pattern, result.stderr, re.IGNORECASE):
                return SshError(
                    cause.message.format(host=name) + _last_lines(result), hint=cause.remedy(host, result.stderr)
                )
        return SshError(f"ssh to {name} failed{_last_lines(result)}", hint=_debug_ssh(host, ""))
    if result.exit_code is None:
        return SshError(
            f"{name} did not finish within {result.seconds:.0f} s{_last_lines(result)}",
            hint=_check_host_is_up(host, ""),
        )
    if result.exit_code == 127 and (command := _missing_command(result.stderr)):
        return SshError(f"{name} has no `{command}`{_last_lines(result)}", hint=f"install `{command}` there")
    return SshError(f"a script failed on {name} with exit code {result.exit_code}{_last_lines(result)}")


def _missing_command(text: str) -> str | None:
    """Return the command that zsh, bash or dash reports as missing."""
    match = re.search(r"command not found: (\S+)", text) or re.search(r"([^\s:]+): (?:command )?not found", text)
    return match[1] if match else None


def _last_lines(result: ScriptResult) -> str:
    """Return the last lines of standard error, without decoration."""
    lines = [line.rstrip() for line in result.stderr.splitlines()]
    quoted = [line for line in lines if line.strip("@ ") and not line.startswith("@")][-KEPT_LINES:]
    return "".join(f"\n  {line}" for line in quoted)
