"""What a check of the doctor has found, and what to type then."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem"]
"""`trouble` stands in the way of a start; a warning does not."""


@dataclass(frozen=True)
class Finding:
    """One check of one host.

    Args:
        host: as the user names it; several are divided by `, `.
        check: such as `disk`.
        state: how bad it is.
        message: what was found, with the numbers.
        remedy: what to do, with the command to type on that host; None if nothing is wrong.
    """

    host: str
    check: str
    state: State
    message: str
    remedy: str | None = None


def has_problem(findings: Iterable[Finding]) -> bool:
    """Whether anything stands in the way."""
    return any(finding.state == "problem" for finding in findings)
