"""Time limits for the end of a rank. Pure.

A hard kill of a process with wired memory can take that memory from the Mac until it restarts (seen on an M3 Ultra:
414 GiB, gh:jundot/omlx#2184), so a rank is given the time to release its weights.
"""

from __future__ import annotations

END_LIMITS_S = {"idle": 10.0, "decode": 10.0, "load": 120.0}
"""Work of a rank -> time until it must have begun to release its memory: one step, or one layer from a slow disk."""

OTHER_END_LIMIT_S = 60.0
"""The same for any other work, such as a chunk of a long prompt."""

UNLOAD_S = 30.0
UNLOAD_BYTES_PER_S = 2e9
"""Lowest rate of releasing memory; releasing 300 GB takes seconds to a minute."""

ABORT_AFTER_S = 1.0
"""Time for the ranks to leave their loops after the same step. After it, their collectives are aborted."""

KILL_S = 10.0
"""Time between SIGTERM and SIGKILL."""

SHOW_AFTER_S = 2.0
"""An end that takes longer than this is shown to the user."""


def end_limit_s(work: str) -> float:
    """Return the time that a rank may need to begin to release its memory, by its current work."""
    return END_LIMITS_S.get(work, OTHER_END_LIMIT_S)


def unload_limit_s(size_bytes: int) -> float:
    """Return the time that the release of memory may take."""
    return UNLOAD_S + size_bytes / UNLOAD_BYTES_PER_S
