"""Trying again: after which failures, after how long, and how often."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TypeVar

from kimi_mlx.errors import WeightsError
from kimi_mlx.hub.error_messages import client_errors, describe, hub_error, status_of

Result = TypeVar("Result")

FIRST_DELAY_S = 1.0
"""Before the second try; doubled after each failure."""
MAX_DELAY_S = 60.0
MAX_RETRY_AFTER_S = 300.0
"""How long the hub may make us wait when it says so itself."""
MAX_FAILURES = 8
"""In a row, without a new byte."""
MAX_LOOKUP_FAILURES = 4
"""Somebody waits for the answer."""


class Cancelled(Exception):
    """The work was called off by its event; nobody needs to be told."""


class IncompleteResponse(OSError):
    """An answer that ended before its bytes were there."""


class Retries:
    """Waits after a failure that may pass, longer each time, and gives up on others.

    Args:
        repository: for messages.
        stop: ends a wait at once.
        max_failures: in a row.
    """

    def __init__(self, repository: str, stop: threading.Event, max_failures: int = MAX_FAILURES):
        self._repository = repository
        self._stop = stop
        self._max_failures = max_failures
        self._failures = 0

    def succeeded(self) -> None:
        """There was progress: counting begins again."""
        self._failures = 0

    def wait_after(self, error: Exception) -> None:
        """Wait until the next try is due.

        Raises:
            WeightsError: it is hopeless, or was tried too often.
            Cancelled: the event is set.
        """
        if not is_transient(error):
            raise hub_error(error, self._repository) from error
        self._failures += 1
        if self._failures >= self._max_failures:
            raise WeightsError(
                f"`{self._repository}` cannot be fetched: {describe(error)}, {self._failures} times in a row",
                hint="check the network and try again; what has been fetched so far is kept",
            ) from error
        if self._stop.wait(_delay_s(error, self._failures)):
            raise Cancelled


def is_transient(error: Exception) -> bool:
    """Whether trying again may help."""
    from huggingface_hub.utils import httpx

    if (status := status_of(error)) is not None:
        return status in (408, 429) or status >= 500
    ours = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)  # a token or an address that is no such thing
    return isinstance(error, (httpx.TransportError, IncompleteResponse)) and not isinstance(error, ours)


def _delay_s(error: Exception, failures: int) -> float:
    if (asked_s := _retry_after_s(error)) is not None:
        return min(asked_s, MAX_RETRY_AFTER_S)
    delay_s = min(FIRST_DELAY_S * 2 ** (failures - 1), MAX_DELAY_S)
    return delay_s * random.uniform(0.5, 1.0)  # else all threads come back at once


def _retry_after_s(error: Exception) -> float | None:
    """What the hub says in `Retry-After` (seconds or a date) or in its own `RateLimit`."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", value, re.ASCII):
        return float(value)
    if value:
        try:
            date = parsedate_to_datetime(value).astimezone(timezone.utc)
        except (ValueError, OverflowError):
            return None
        return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())
    limit = re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


def with_retries(request: Callable[[], Result], retries: Retries) -> Result:
    """What the request returns, tried again after failures that may pass."""
    while True:
        try:
            return request()
        except client_errors() as error:
            retries.wait_after(error)
