"""What a check of the doctor has found, and what to type then."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem"]
"""A `problem` prevents a start; a `warning` does not."""


@dataclass(frozen=True)
class Finding:
    """Result of one check on one host.

    Args:
        host: host as the user names it; several names are joined with `, `.
        check: name of the check, such as `disk`.
        state: severity.
        message: result of the check, with the numbers.
        remedy: instruction with the command to type on that host; None if nothing is wrong.
    """

    host: str
    check: str
    state: State
    message: str
    remedy: str | None = None


def has_problem(findings: Iterable[Finding]) -> bool:
    """Return whether a finding is a problem."""
    return any(finding.state == "problem" for finding in findings)
