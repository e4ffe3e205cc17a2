"""Shorter waits and measurements, for tests.

Limits that could stop something alive keep their defaults, because test machines may be busy; a test of such a limit
shortens it itself.
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
from tests.cluster.short_waits import shorten_waits
shorten_waits()
from kimi_mlx.cli.app import main
main()
"""


TRUSTING_MAIN = f"""
from kimi_mlx.cluster.network import links
links.PREFERENCE = links.ROUND_TRIP_LIMIT_S = 1000.0
links.RATE_LIMIT_BYTES_PER_S = 0
{MAIN}
"""
"""Accept the first network that answers: on a busy machine any of them may measure as slow."""


def shorten_waits(change: Callable[[object, str, object], None] = setattr) -> None:
    """Shorten the waits of this process.

    Args:
        change: function that sets an attribute, e.g. a MonkeyPatch's `setattr`.
    """
    from kimi_mlx.session import restart_policy

    measure_network = partial(measure_networks.measure_network, limit_s=PAIR_LIMIT_S)
    for module in (measure_networks, choose):
        change(module, "measure_network", measure_network)
    change(measure_networks, "command", _short_command)
    change(payloads, "PAYLOAD_S", 0.1)
    change(restart_policy, "RESTART_DELAYS_S", (RESTART_DELAY_S,))


def _short_command(*arguments: Any) -> list[str]:
    """Return the command of a measurement that sends for 0.2 s."""
    command = measure.command(*arguments)
    assert any("BULK_S = 1.0" in part for part in command)
    return [part.replace("BULK_S = 1.0", "BULK_S = 0.2") for part in command]
