"""Kill processes and remove temporary files that ranks have left on a host, found by their tag."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from kimi_mlx.cluster.hosts.ssh import run_everywhere
from kimi_mlx.cluster.ring.guard import FOLDER_PREFIX

CLEANUP_LIMIT_S = 8.0
"""Timeout for a host, with the connection."""

_SCRIPT = """
tag={tag}
pids() {{ ps -A -ww -o pid=,args= | awk -v tag="$tag" 'index($0, tag) && !/awk/ {{print $1}}'; }}
for attempt in 1 2 3 4 5 6 7 8 9 10; do
  left=$(pids)
  [ -n "$left" ] || break
  kill -9 $left 2>/dev/null
  sleep 0.1
done
rm -rf "${{TMPDIR:-/tmp}}/{prefix}$tag"-*
[ -z "$(pids)" ]
"""


def kill_leftovers(hosts: Iterable[str], tag: str, envs: Sequence[str] = ()) -> list[str]:
    """Kill the processes that are left and verify that none remains, on all hosts at once.

    Args:
        hosts: names of the hosts.
        tag: tag of the ranks: letters and digits.
        envs: `NAME=value` that the ranks were started with; TMPDIR may be among them.

    Returns:
        Names of hosts that could not be reached, or where processes remain.
    """
    exports = "".join(f"export {shlex.quote(env)}\n" for env in envs)
    script = exports + _SCRIPT.format(tag=tag, prefix=FOLDER_PREFIX)
    results = run_everywhere(hosts, script, CLEANUP_LIMIT_S)
    return [host for host, result in results.items() if not result.is_ok]
