"""Making sure that nothing is left of ranks on a host: processes and temporary files that carry their tag."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from kimi_mlx.cluster.hosts.ssh import run_everywhere
from kimi_mlx.cluster.ring.guard import FOLDER_PREFIX

CLEANUP_LIMIT_S = 8.0
"""For a host, connecting included."""

_SCRIPT = """
tag={tag}
pids() {{ ps -A -ww -o pid=,args= | awk -v tag="$tag" 'index($0, tag) && !/awk/ {{print $1}}'; }}
for turn in 1 2 3 4 5 6 7 8 9 10; do
  left=$(pids)
  [ -n "$left" ] || break
  kill -9 $left 2>/dev/null
  sleep 0.1
done
rm -rf "${{TMPDIR:-/tmp}}/{prefix}$tag"-*
[ -z "$(pids)" ]
"""


def sweep(hosts: Iterable[str], tag: str, envs: Sequence[str] = ()) -> list[str]:
    """Kill what is left, and look again; all hosts at once.

    Args:
        hosts: their names.
        tag: of the ranks: letters and digits.
        envs: `NAME=value` that they were started with; TMPDIR may be one of them.

    Returns:
        The hosts that could not be asked, or where something is left all the same.
    """
    exports = "".join(f"export {shlex.quote(each)}\n" for each in envs)
    script = exports + _SCRIPT.format(tag=tag, prefix=FOLDER_PREFIX)
    answers = run_everywhere(hosts, script, CLEANUP_LIMIT_S)
    return [host for host, answer in answers.items() if not answer.is_ok]
