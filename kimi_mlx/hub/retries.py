"""Retries: which errors are transient, how long to wait, and when to give up."""

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
"""Delay before the first retry; doubled after each failure."""
MAX_DELAY_S = 60.0
MAX_RETRY_AFTER_S = 300.0
"""Longest delay that the hub can demand."""
MAX_FAILURES = 8
"""Number of consecutive failures without a new byte."""
MAX_LOOKUP_FAILURES = 4
"""The same for a look-up: fewer, because a user is waiting for it."""


class Cancelled(Exception):
    """The work was cancelled by its event. Not an error for the user."""


class IncompleteResponse(OSError):
    """A response ended before all of its bytes arrived."""


class Retries:
    """Waits after transient errors, longer each time, and raises others.

    Args:
        repository: name of the repository, for messages.
        stop: event that ends a wait at once.
        max_failures: number of consecutive failures.
    """

    def __init__(self, repository: str, stop: threading.Event, max_failures: int = MAX_FAILURES):
        self._repository = repository
        self._stop = stop
        self._max_failures = max_failures
        self._failures = 0

    def succeeded(self) -> None:
        """Reset the number of failures after progress."""
        self._failures = 0

    def wait_after(self, error: Exception) -> None:
        """Wait until the next attempt.

        Raises:
            WeightsError: the error is permanent, or there were too many failures.
            Cancelled: the event is set.
        """
        if not is_transient(error):
            raise hub_error(error, self._repository) from error
        self._failures += 1
        if self._failures >= self._max_failures:
            raise WeightsError(
                f"cannot download `{self._repository}`: {describe(error)}, {self._failures} times in a row",
                hint="check the network, then run the same command again to resume",
            ) from error
        if self._stop.wait(_delay_s(error, self._failures)):
            raise Cancelled


def is_transient(error: Exception) -> bool:
    """Whether a retry may help."""
    from huggingface_hub.utils import httpx

    if (status := status_of(error)) is not None:
        return status in (408, 429) or status >= 500
    permanent = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)  # invalid token or address
    return isinstance(error, (httpx.TransportError, IncompleteResponse)) and not isinstance(error, permanent)


def _delay_s(error: Exception, failures: int) -> float:
    if (retry_after_s := _retry_after_s(error)) is not None:
        return min(retry_after_s, MAX_RETRY_AFTER_S)
    delay_s = min(FIRST_DELAY_S * 2 ** (failures - 1), MAX_DELAY_S)
    return delay_s * random.uniform(0.5, 1.0)  # jitter: else all threads retry at once


def _retry_after_s(error: Exception) -> float | None:
    """Return the delay in the hub's `Retry-After` (seconds or a date) or `RateLimit` header."""
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
    """Return the request's result; retry after transient errors."""
    while True:
        try:
            return request()
        except client_errors() as error:
            retries.wait_after(error)
