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
    return (
        f"install your key there: `ssh-copy-id {host}` (if you have no key, first `ssh-keygen -t ed25519`); "
        "a key with a passphrase also needs `ssh-add`"
    )


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


def _fix_config(host: str, _: str) -> str:
    return f"fix the lines that ssh names; `ssh -G {host}` shows whether it can read them"


def _restrict_file(_: str, text: str) -> str:
    files = re.findall(r"Bad owner or permissions on (\S+)|Permissions \d+ for '(.+?)' are too open", text)
    path = next((name for pair in files for name in pair if name), "FILE")
    return f"remove the access of other users: `chmod go-rwx {shlex.quote(path)}`; `ls -l` shows its owner"


def _replace_key(host: str, text: str) -> str:
    files = re.findall(r'Load key "(.+?)"|no such identity: (.+?):', text)
    path = next((name for names in files for name in names if name), "KEY")
    return (
        f"check it with `ssh-keygen -y -f {shlex.quote(path)}`; to replace it: `ssh-keygen -t ed25519 -f NEW_KEY`, "
        f"`ssh-copy-id -i NEW_KEY {host}`, and `IdentityFile NEW_KEY` in ~/.ssh/config"
    )


def _add_to_agent(_: str, __: str) -> str:
    return "unlock the key for this login: `ssh-add`; `ssh-add -l` lists the unlocked keys"


def _limit_keys(host: str, _: str) -> str:
    return f"add `IdentitiesOnly yes` and `IdentityFile KEY` for `Host {host}` to ~/.ssh/config"


def _check_jump_host(host: str, _: str) -> str:
    return f"check `ProxyJump` and `ProxyCommand` in ~/.ssh/config: `ssh -G {host} | grep -i proxy` shows them"


def _fix_control_path(host: str, _: str) -> str:
    return f"create the folder of `ControlPath`, or shorten its path: `ssh -G {host} | grep -i controlpath` shows it"


def _update_ssh(host: str, _: str) -> str:
    return f"update the older system, or add the algorithm that ssh names for `Host {host}` to ~/.ssh/config"


# The first match counts: a changed key is also a failed verification, and a key file that cannot be read also a refused
# login. Broken files come first: the network cannot be the cause then.
_CAUSES = (
    _Cause(
        r"terminating, \d+ bad|^\S.* line \d+: (?!.*not found)|can't open user config file|^bind \S+: ",
        "ssh cannot connect to {host}: its configuration has an error",
        _fix_config,
    ),
    _Cause(
        r"bad owner or permissions on|unprotected private key file|permissions \d+ for .* are too open",
        "ssh cannot connect to {host}: other users may change or read one of its files",
        _restrict_file,
    ),
    _Cause(
        r'load key ".*": (?!.*passphrase)|no such identity: ',
        "ssh cannot connect to {host}: a key file cannot be read",
        _replace_key,
    ),
    _Cause(
        r'signing failed for|agent refused operation|load key ".*passphrase',
        "ssh cannot connect to {host}: the key is locked",
        _add_to_agent,
    ),
    _Cause(
        r"host identification has changed|host key for \S+ has changed",
        "{host} has a different host key than before",
        _remove_old_key,
    ),
    _Cause(
        r"UNKNOWN port 65535|stdio forwarding failed|open failed: |command not found|exec: .*: not found",
        "the jump host or proxy command for {host} failed",
        _check_jump_host,
    ),
    _Cause(
        r"unix_listener: |controlpath|control socket path",
        "ssh cannot connect to {host}: it cannot create its control socket",
        _fix_control_path,
    ),
    _Cause(r"host key is known for|host key verification failed", "{host} is not known to ssh yet", _accept_key),
    _Cause(r"too many authentication failures", "{host} refuses the login: ssh offered too many keys", _limit_keys),
    _Cause(r"permission denied", "{host} refuses the login", _copy_key),
    _Cause(r"unable to negotiate|no matching ", "ssh and {host} have no algorithm in common", _update_ssh),
    _Cause(
        r"connect to .*connection refused",
        "{host} refuses connections: no SSH server is running there",
        _enable_remote_login,
    ),
    _Cause(r"could not resolve hostname", "the name {host} cannot be resolved", _check_name),
    _Cause(r"timeout, server \S+ not responding|broken pipe", "{host} stopped responding", _check_host_is_up),
    _Cause(
        r"no route to host|network is unreachable|host is down|timed out|can't assign requested address",
        "{host} cannot be reached",
        _check_host_is_up,
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
            if re.search(cause.pattern, result.stderr, re.IGNORECASE | re.MULTILINE):
                return SshError(
                    cause.message.format(host=name) + _last_lines(result), hint=cause.remedy(host, result.stderr)
                )
        return SshError(f"ssh to {name} failed{_last_lines(result)}", hint=_debug_ssh(host, ""))
    if not result.has_started:
        return _explain_login_shell(result)
    if result.exit_code is None:
        return SshError(
            f"{name} did not finish within {result.seconds:.0f} s{_last_lines(result)}",
            hint=_check_host_is_up(host, ""),
        )
    if result.exit_code == 127 and (command := _missing_command(result.stderr)):
        return SshError(f"{name} has no `{command}`{_last_lines(result)}", hint=f"install `{command}` there")
    return SshError(f"a script failed on {name} with exit code {result.exit_code}{_last_lines(result)}")


def _explain_login_shell(result: ScriptResult) -> SshError:
    """Return the error for a script that the login shell did not start."""
    host, name = shlex.quote(result.host), f"`{result.host}`"
    if result.exit_code is None:
        return SshError(
            f"{name} did not start our command within {result.seconds:.0f} s{_last_lines(result)}",
            hint=f"try `ssh {host} /bin/sh -c true`: if it hangs, a start-up file of its login shell waits (such as "
            ".bashrc or .zshenv); if not, check that the host is awake",
        )
    return SshError(
        f"the login shell of {name} did not run our command (exit code {result.exit_code}){_last_lines(result)}",
        hint=f"try `ssh {host} /bin/sh -c true`: if it fails, a start-up file of its login shell (such as .bashrc or "
        ".zshenv) exits, starts another program, or reads the input; let it do so only on a terminal: `[ -t 0 ]`",
    )


def _missing_command(text: str) -> str | None:
    """Return the command that zsh, bash or dash reports as missing."""
    match = re.search(r"command not found: (\S+)", text) or re.search(r"([^\s:]+): (?:command )?not found", text)
    return match[1] if match else None


def _last_lines(result: ScriptResult) -> str:
    """Return the last lines of standard error, without decoration; before the script has started, of all output."""
    text = result.stderr if result.has_started else f"{result.greeting}\n{result.stderr}"
    lines = [line.rstrip() for line in text.splitlines()]
    quoted = [line for line in lines if line.strip("@ ") and not line.startswith("@")][-KEPT_LINES:]
    return "".join(f"\n  {line}" for line in quoted)
