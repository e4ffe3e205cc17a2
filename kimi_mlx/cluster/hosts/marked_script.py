"""Scripts that run in a host's `sh` whatever its login shell does first: print, wait, change folder, define aliases.

sshd hands our command to the user's login shell, which first reads start-up files (.bashrc, .zshenv, config.fish,
.cshrc). The command is therefore as simple as possible, and the script comes on standard input. The script
prints a mark before its own output, and may print one after it; everything else is the login shell's.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

_EDGE = "#kimi-mlx"
"""First and last line of a script. If a start-up file has read from it, they are not both there, and it is not run."""

_NAME = "kimi-mlx"
"""`$0` of the script. It differs in another shell that a start-up file has started instead."""

_END = " end"
"""Suffix that turns the mark into the mark at the end of the output."""

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
        has_end_mark: whether to print a mark after the output too.
    """
    mark = f"kimi-mlx {secrets.token_hex(8)}"
    if has_end_mark:  # also if the script calls `exit`
        script = f"(\n{script}\n)\nset -- $?\nprintf '\\n{mark}{_END}\\n'\nexit $1"
    go_home = "cd 2>/dev/null || cd /" if is_remote else ""
    prelude = _PRELUDE.format(name=_NAME, go_home=go_home, mark=mark)
    data = f"{_EDGE}\n{prelude}{script}\n{_EDGE}".encode()
    return MarkedScript(["/bin/sh", "-c", _COMMAND.format(size=len(data)), _NAME], data, mark.encode())


def split_at_mark(output: bytes, mark: bytes) -> tuple[bytes, bytes | None]:
    """Return the output before the mark, and the script's own output up to its end; None if it has no mark."""
    before, separator, after = output.partition(b"\n" + mark + b"\n")
    return before, after.partition(b"\n" + mark + _END.encode() + b"\n")[0] if separator else None
