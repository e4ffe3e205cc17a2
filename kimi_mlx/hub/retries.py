"""Retries: which errors are transient, how long to wait, and when to give up.

Long waits are logged to `kimi_mlx.hub`; by default, Python prints these lines on stderr.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from json import JSONDecodeError
from typing import ClassVar, TypeVar

from kimi_mlx.hub.environment_check import check_settings
from kimi_mlx.hub.error_messages import (
    client_errors,
    describe,
    hub_error,
    is_certificate_error,
    not_a_hub_error,
    status_of,
    unreachable_error,
)

Result = TypeVar("Result")

FIRST_DELAY_S = 1.0
"""Delay before the first retry; doubled after each failure."""
MAX_DELAY_S = 60.0
MAX_RETRY_AFTER_S = 3600.0
"""Longest delay that the hub can demand."""
MIN_RETRY_AFTER_S, NUM_TRUSTED_DELAYS = 1.0, 3
"""After this number of failures, a `Retry-After` below the minimum is ignored: the hub may send 0 for hours."""
MAX_WAIT_S = 8 * 3600.0
"""Longest wait without a new byte: a download overnight survives an outage of the hub or of the network."""
MAX_LOOKUP_FAILURES = 4
"""Maximum number of failed connections of a look-up: nothing has been downloaded yet, and a user is waiting."""
MAX_WRONG_RESPONSES = 3
"""Maximum number of consecutive responses that are not from a hub, or not the requested file."""

NOTICE_AFTER_S = 4.0
"""Shortest total wait that is announced."""
NOTICE_EVERY_S = 600.0
"""Shortest time between two announcements of one process."""

LOG = logging.getLogger("kimi_mlx.hub")


class Cancelled(Exception):
    """The work was cancelled by its event. Not an error for the user."""


class IncompleteResponse(OSError):
    """A response ended before all of its bytes arrived."""


class WrongResponse(OSError):
    """A response is not the requested file: it may come from a proxy or a login page."""


class Retries:
    """Waits after transient errors, longer each time, and raises others.

    Args:
        repository: name of the repository, for messages.
        stop: event that ends a wait at once.
        max_wait_s: longest wait without progress; None for MAX_WAIT_S.
        max_lost_connections: number of failures without a response after which it gives up; None for no limit.
    """

    _announced_s: ClassVar[float] = -NOTICE_EVERY_S

    def __init__(
        self,
        repository: str,
        stop: threading.Event,
        max_wait_s: float | None = None,
        max_lost_connections: int | None = None,
    ):
        self._repository = repository
        self._stop = stop
        self._max_wait_s = MAX_WAIT_S if max_wait_s is None else max_wait_s
        self._max_lost_connections = max_lost_connections
        self._failures = 0
        self._failing_since_s = 0.0

    def succeeded(self) -> None:
        """Reset the number of failures after progress."""
        self._failures = 0

    def wait_after(self, error: Exception) -> None:
        """Wait until the next attempt.

        Raises:
            WeightsError: the error is permanent, or lasts too long.
            UsageError: an environment variable is broken, which explains the error.
            Cancelled: the event is set.
        """
        is_wrong = isinstance(error, (WrongResponse, JSONDecodeError))
        if not (is_wrong or is_transient(error)):
            raise hub_error(error, self._repository) from error
        if not self._failures:
            if status_of(error) is None:
                check_settings()
            self._failing_since_s = time.monotonic()
        self._failures += 1
        if is_wrong and self._failures >= MAX_WRONG_RESPONSES:
            raise not_a_hub_error(self._repository, str(error)) from error
        delay_s, waited_s = _delay_s(error, self._failures), time.monotonic() - self._failing_since_s
        limit = self._max_lost_connections if status_of(error) is None else None
        if waited_s + delay_s > self._max_wait_s or (limit is not None and self._failures >= limit):
            raise unreachable_error(error, self._repository, self._failures) from error
        while delay_s > 0:
            if limit is None and waited_s + delay_s >= NOTICE_AFTER_S:
                self._announce(error, delay_s)
            if self._stop.wait(min(delay_s, NOTICE_EVERY_S)):
                raise Cancelled
            delay_s -= NOTICE_EVERY_S

    def _announce(self, error: Exception, delay_s: float) -> None:
        now_s = time.monotonic()
        if now_s - Retries._announced_s >= NOTICE_EVERY_S:
            Retries._announced_s = now_s
            LOG.warning(
                "waiting: %s. Trying again in %.0f s, for up to %.3g h; Ctrl-C stops, and the same command resumes",
                describe(error),
                delay_s,
                self._max_wait_s / 3600,
            )


def is_transient(error: Exception) -> bool:
    """Return whether a retry may help."""
    from huggingface_hub.utils import httpx

    if (status := status_of(error)) is not None:
        return status in (408, 429) or status >= 500
    permanent = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)  # invalid token or address
    is_refused_by_proxy = isinstance(error, httpx.ProxyError) and str(error).startswith("4")
    if isinstance(error, permanent) or is_certificate_error(error) or is_refused_by_proxy:
        return False
    return isinstance(error, (httpx.TransportError, IncompleteResponse))


def _delay_s(error: Exception, failures: int) -> float:
    delay_s = min(FIRST_DELAY_S * 2 ** min(failures - 1, 30), MAX_DELAY_S)
    delay_s *= random.uniform(0.5, 1.0)  # jitter: else all threads retry at once
    retry_after_s = _retry_after_s(error)
    if retry_after_s is None or (retry_after_s < MIN_RETRY_AFTER_S and failures > NUM_TRUSTED_DELAYS):
        return delay_s
    return min(retry_after_s, MAX_RETRY_AFTER_S)


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
