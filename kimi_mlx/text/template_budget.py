"""Limits of one run of a chat template: operations, processor time, and memory of the values that it creates."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, cast

MAX_STEPS = 1_000_000
"""Limit of loop steps, calls, filters and other operations in one run."""
MAX_CPU_S = 1.5
"""Limit of processor time in one run."""
MAX_CHARS = 10_000_000
"""Limit of one text; also of the texts in one list or object together, where each entry counts as `ENTRY_CHARS`."""
ENTRY_CHARS = 32
MAX_BYTES = 384 * 2**20
"""Limit of all values that one run creates, including those that it no longer uses."""
MAX_SPLIT_CHARS = 2_000_000
"""Limit of a text that is cut into words or lines, because each part is an object of its own."""
MAX_INTEGER_BITS = 10_000
CONTAINERS = (list, tuple, dict, set, frozenset)


class TemplateLimitError(Exception):
    """A template exceeds a limit."""


class Budget:
    """Remaining budget of one run of a template."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._bytes = MAX_BYTES
        self._deadline = time.thread_time() + MAX_CPU_S
        # A container stays referenced, so that its id is not used for another one.
        self._sizes: dict[int, tuple[Any, int]] = {}

    def step(self, count: int = 1) -> None:
        """Count operations.

        Raises:
            TemplateLimitError: too many operations, or too much time.
        """
        self._steps -= count
        if self._steps < 0:
            raise TemplateLimitError(f"loops take more than {MAX_STEPS} steps")
        if time.thread_time() > self._deadline:
            raise TemplateLimitError(f"the template takes more than {MAX_CPU_S} s")

    def size(self, value: Any) -> int:
        """Return the characters of a text, or of all texts in a container, with `ENTRY_CHARS` for each entry.

        Raises:
            TemplateLimitError: the value has more than `MAX_CHARS`.
        """
        if isinstance(value, str):
            return check_chars(len(value))
        if not is_container(value):
            return ENTRY_CHARS
        if (record := self._sizes.get(id(value))) is not None:
            return record[1]
        entries = cast("Iterable[Any]", value)
        if isinstance(value, dict):
            entries = itertools.chain(*cast("dict[Any, Any]", value).items())
        total = ENTRY_CHARS
        for entry in entries:
            total = check_chars(total + ENTRY_CHARS + self.size(entry))
        self._sizes[id(cast("Any", value))] = (value, total)
        return total

    def charge(self, value: Any) -> Any:
        """Count a new value and return it.

        Raises:
            TemplateLimitError: the value is too large, or all values together are.
        """
        self.size(value)
        if isinstance(value, str):
            self._bytes -= sys.getsizeof(value)
        elif isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise TemplateLimitError(f"a number of {value.bit_length()} bits is too large")
        elif is_container(value):
            self._bytes -= 64 * len(cast("list[Any]", value))
        if self._bytes < 0:
            raise TemplateLimitError(f"the template makes values of more than {MAX_BYTES} bytes: too large")
        return value


budget_of_run: ContextVar[Budget] = ContextVar("budget_of_run")


def budget() -> Budget:
    """Return the budget of the current run in this thread."""
    return budget_of_run.get()


def check_chars(num_chars: int) -> int:
    """Check a number of characters and return it.

    Raises:
        TemplateLimitError: there are more than `MAX_CHARS`.
    """
    if num_chars > MAX_CHARS:
        raise TemplateLimitError(f"a value of more than {MAX_CHARS} characters is too large")
    return num_chars


def is_container(value: Any) -> bool:
    """Return whether a value is a list, tuple, object or set."""
    return isinstance(value, CONTAINERS)


def count_steps(values: Iterable[Any]) -> Iterator[Any]:
    """Count the entries of an iterable as steps, when they are used."""
    limits = budget()
    for value in values:
        limits.step()
        yield value
