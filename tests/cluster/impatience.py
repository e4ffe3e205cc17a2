"""Less patience than users have, and measurements that are sooner over, for tests of what comes then.

Limits after which something alive is given up stay as users have them, for machines that are busy; a test of such a
limit shortens it by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from kimi_mlx.cluster.doctor import payloads
from kimi_mlx.cluster.network import choose, measure, measure_networks

PAIR_LIMIT_S = 3.0
RESTART_DELAY_S = 0.5

MAIN = """
from tests.cluster.impatience import be_impatient
be_impatient()
from kimi_mlx.cli.app import main
main()
"""


TRUSTING_MAIN = f"""
from kimi_mlx.cluster.network import links
links.PREFERENCE = links.ROUND_TRIP_LIMIT_S = 1000.0
links.RATE_LIMIT_BYTES_PER_S = 0
{MAIN}
"""
"""The first network that answers is taken: on a machine that is busy each may be found to be the slow one."""


def be_impatient(change: Callable[[object, str, object], None] = setattr) -> None:
    """Shorten what this process waits for.

    Args:
        change: how, such as a MonkeyPatch's `setattr`.
    """
    from kimi_mlx.session import restart_policy

    impatient = partial(measure_networks.measure_network, limit_s=PAIR_LIMIT_S)
    for module in (measure_networks, choose):
        change(module, "measure_network", impatient)
    change(measure_networks, "command", _short_command)
    change(payloads, "PAYLOAD_S", 0.1)
    change(restart_policy, "RESTART_DELAYS_S", (RESTART_DELAY_S,))


def _short_command(*arguments: Any) -> list[str]:
    """A measurement that sends for less than a second."""
    words = measure.command(*arguments)
    source = words.index(next(word for word in words if "BULK_S = 1.0" in word))
    words[source] = words[source].replace("BULK_S = 1.0", "BULK_S = 0.2")
    return words
