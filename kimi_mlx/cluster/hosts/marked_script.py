"""Scripts that run in a host's `sh` whatever its login shell does first: print, wait, change folder, define aliases.

sshd hands our command to the user's login shell, which first reads start-up files (.bashrc, .zshenv, config.fish,
.cshrc). The command is therefore as simple as possible, and the script comes on standard input. The script
prints a mark before its own output, and may print one after it; everything else is the login shell's.

A job that a start-up file leaves in the background keeps our output open, and may print at any time. So we do not wait
for the end of the output, but for the mark after it; and a program that sends messages begins each with a prefix.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

_EDGE = "#kimi-mlx"
"""First and last line of a script. If a start-up file has read from it, they are not both there, and it is not run."""

_NAME = "kimi-mlx"
"""`$0` of the script. It differs in another shell that a start-up file has started instead."""

_END = " end "
"""Text between the mark and the exit code, in the line after the output."""

PREFIX_VARIABLE = "KIMI_MLX_PREFIX"
"""Environment variable with the text that precedes each message of a program of ours."""

_COMMAND = (
    "script=$(PATH=/usr/bin:/bin:$PATH command dd bs=1 count={size} 2>/dev/null); case $script in "
    f'"{_EDGE}"*"{_EDGE}") eval "$script" ;; *) exit 97 ;; esac'
)

# An exported function of bash would replace a command of the script; `declare` is missing in dash, which has none.
_PRELUDE = """\
[ "$0" = {name} ] || exit 97
set -f
for word in $(declare -F 2>/dev/null); do
  case $word in -* | declare) ;; *) unset -f "$word" 2>/dev/null ;; esac
done
set +f
unset word
PATH=${{PATH:-/usr/bin}}:/usr/bin:/bin:/usr/sbin:/sbin
{go_home}
export {variable}='{prefix}'
printf '\\n{mark}\\n'
printf '\\n{mark}\\n' >&2
"""


@dataclass(frozen=True)
class MarkedScript:
    """A script, and how to run it.

    Attributes:
        command: command that reads the script from the start of its input; the rest is the script's own input.
        data: the script, with which the input must start.
        mark: line that standard output and standard error have before the script's own output.
    """

    command: Sequence[str]
    data: bytes
    mark: bytes


def mark_script(script: str, *, is_remote: bool, has_end_mark: bool = False) -> MarkedScript:
    """Return a script that prints a mark first.

    The command does not use `sh -s`, because some shells read ahead into the script's input; `dd` with `bs=1` does not.

    Args:
        script: script for a POSIX shell.
        is_remote: whether to change to the home folder first, as start-up files may have left it.
        has_end_mark: whether to print a mark with the exit code after standard output and standard error too.
    """
    mark = f"kimi-mlx {secrets.token_hex(8)}"
    if has_end_mark:  # also if the script calls `exit`
        end = f"printf '\\n{mark}{_END}%d\\n' $1"
        script = f"(\n{script}\n)\nset -- $?\n{end}\n{end} >&2\nexit $1"
    go_home = "cd 2>/dev/null || cd /" if is_remote else ""
    prefix = message_prefix(mark.encode()).decode()
    prelude = _PRELUDE.format(name=_NAME, go_home=go_home, mark=mark, variable=PREFIX_VARIABLE, prefix=prefix)
    data = f"{_EDGE}\n{prelude}{script}\n{_EDGE}".encode()
    return MarkedScript(["/bin/sh", "-c", _COMMAND.format(size=len(data)), _NAME], data, mark.encode())


def message_prefix(mark: bytes) -> bytes:
    """Return what precedes each message after a mark; empty if the mark is."""
    return mark + b": " if mark else b""


@dataclass(frozen=True)
class MarkedOutput:
    """Output of a marked script.

    Args:
        before: what the login shell printed before the mark.
        own: output of the script, without what follows its end mark; None if the mark is missing.
        exit_code: exit code in the end mark; None without one.
    """

    before: bytes
    own: bytes | None
    exit_code: int | None


def split_at_mark(output: bytes, mark: bytes) -> MarkedOutput:
    """Split the output of a script at its marks."""
    before, has_mark, after = output.partition(b"\n" + mark + b"\n")
    own, has_end, rest = after.partition(b"\n" + mark + _END.encode())
    code, has_line, _ = rest.partition(b"\n")
    return MarkedOutput(before, own if has_mark else None, int(code) if has_end and has_line else None)
