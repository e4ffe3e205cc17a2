"""How many examples hypothesis tries."""

from __future__ import annotations

from hypothesis import settings

THOROUGH = 25
"""Examples of a property in the profile `thorough`."""
QUICK = 8


def examples(count: int) -> settings:
    """Return settings with a number of examples, of which a quick run tries a third.

    Args:
        count: number of examples in the profile `thorough`.
    """
    return settings(max_examples=max(1, count * settings().max_examples // THOROUGH))
