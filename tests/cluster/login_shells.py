"""Start-up files of login shells that print, wait, change folder, and hide commands behind aliases and functions."""

from __future__ import annotations

_PRINT = r"""
printf 'Welcome \033[1mhome\033[0m \007'
printf '\n{"kind": "error", "type": "RingError", "message": "wrong", "hint": null, "rank": 0}\n'
printf 'system=Darwin\n{"kind": "alive", "work": "idle", "step": 9}'
printf 'a complaint' >&2
"""

NOISY = {
    "bash": f"""{_PRINT}
shopt -s expand_aliases
alias sh='echo alias' exec='echo alias' env='echo alias' eval='echo alias' printf='echo alias'
for name in dd sh env cat sed tr date ps rm mkdir printf python3 cd; do
  eval "$name() {{ echo function; }}; export -f $name"
done
sleep 2
builtin cd /usr
trap 'builtin printf bye' EXIT
""",
    "zsh": f"""{_PRINT}
alias sh='echo alias' exec='echo alias' env='echo alias' eval='echo alias'
alias -g L='| less'
function dd sh env cat sed {{ echo function }}
sleep 2
builtin cd /usr
""",
    "fish": f"""{_PRINT}
alias env 'echo alias'
function sh; echo function; end
function dd; echo function; end
sleep 2
cd /usr
""",
    "tcsh": f"""{_PRINT.replace("printf 'a complaint' >&2", "")}
alias sh 'echo alias'
alias dd 'echo alias'
alias exec 'echo alias'
alias env 'echo alias'
sleep 2
cd /usr
""",
}
"""Name of a shell -> content of the start-up file that it reads for every command."""

BACKGROUND_JOBS = {
    "a job that prints later": "(sleep 2; while :; do echo late; printf partial; sleep 1; done) &",
    "a job that keeps the output open": "sleep 1000 &",
    "a job with a copy of the output": "exec 3>&1; sleep 1000 >/dev/null 2>&1 &",
    "ignored signals": "trap '' TERM HUP INT",
}
"""Description -> start-up file of bash that leaves a job in the background, or makes all processes ignore signals."""
