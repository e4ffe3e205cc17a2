"""End processes and remove temporary files that ranks have left on a host, found by their tag."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kimi_mlx.cluster.hosts.ssh import run_everywhere
from kimi_mlx.temporary import PREFIX

CLEANUP_LIMIT_S = 8.0
"""Timeout for a host, with the connection, in addition to the time for the processes to end."""

_SCRIPT = """
tag={tag}
pids() {{ ps -A -ww -o pid=,args= | awk -v tag="$tag" 'index($0, tag) && !/awk/ {{print $1}}'; }}
left=$(pids)
[ -z "$left" ] || kill -TERM $left 2>/dev/null
[ -z "$left" ] || kill -CONT $left 2>/dev/null
end=$(($(date +%s) + {limit_s}))
while left=$(pids); [ -n "$left" ] && [ "$(date +%s)" -lt "$end" ]; do sleep 0.1; done
killed=0
for attempt in 1 2 3 4 5 6 7 8 9 10; do
  [ -n "$left" ] || break
  [ "$killed" -gt 0 ] || killed=$(echo "$left" | wc -l)
  kill -9 $left 2>/dev/null
  sleep 0.1
  left=$(pids)
done
rm -rf "${{TMPDIR:-/tmp}}/{prefix}$tag"-*
echo "kimi-mlx-killed $killed"
[ -z "$left" ]
"""


@dataclass(frozen=True)
class CleanupResult:
    """Result of end_leftovers.

    Args:
        unconfirmed_hosts: hosts that could not be reached, or where processes remain.
        num_killed: host -> number of processes that did not end by themselves.
    """

    unconfirmed_hosts: list[str]
    num_killed: Mapping[str, int]


def end_leftovers(hosts: Sequence[str], tag: str, limit_s: float, envs: Sequence[str] = ()) -> CleanupResult:
    """End the processes that are left, kill those that do not end in time, and verify that none remains.

    Args:
        hosts: names of the hosts.
        tag: tag of the ranks: letters and digits.
        limit_s: time for the processes to release their memory.
        envs: `NAME=value` that the ranks were started with; TMPDIR may be among them.
    """
    if not hosts:
        return CleanupResult([], {})
    exports = "".join(f"export {shlex.quote(env)}\n" for env in envs)
    script = exports + _SCRIPT.format(tag=tag, prefix=PREFIX, limit_s=int(limit_s) + 1)
    results = run_everywhere(hosts, script, limit_s + CLEANUP_LIMIT_S)
    counts = {host: result.stdout.rpartition("kimi-mlx-killed ")[2].strip() for host, result in results.items()}
    return CleanupResult(
        [host for host, result in results.items() if not result.is_ok],
        {host: int(count) for host, count in counts.items() if count.isdigit() and int(count)},
    )
