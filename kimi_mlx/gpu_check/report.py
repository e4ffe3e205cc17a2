"""Report of the checks, as lines of text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kimi_mlx.gpu_check.checks import CheckResult, Measurement, State
from kimi_mlx.units import format_gib

SYMBOLS: dict[State, str] = {
    "ok": "✓ ok",
    "failed": "✗ failed",
    "error": "✗ error",
    "timeout": "✗ timeout",
    "skipped": "- skipped",
}
STATE_WIDTH, TITLE_WIDTH = 10, 40

MAX_FAILURES = 3
"""Number of failed comparisons of a check that the text shows; JSON has all."""


def heading(description: Mapping[str, Any]) -> str:
    """Return the device and the versions as one line."""
    versions = description["versions"]
    memory = f", {format_gib(description['memory_bytes'])}" if description["memory_bytes"] else ""
    return (
        f"{description['name']} ({description['kind']}{memory}), {versions['system']}, MLX {versions['mlx']}, "
        f"kimi-mlx {versions['kimi_mlx']}, Python {versions['python']}"
    )


def check_lines(result: CheckResult) -> Iterator[str]:
    """Yield the lines of one check: its state, then what failed."""
    failures = [comparison for comparison in result.comparisons if not comparison.is_ok]
    title = f"{SYMBOLS[result.state]:{STATE_WIDTH}} {result.check.title:{TITLE_WIDTH}}"
    yield f"{title} {result.message or _summary(result, len(failures))}  ({result.seconds:.0f} s)"
    for comparison in failures[:MAX_FAILURES]:
        yield f"{'':{STATE_WIDTH}} {comparison.name}: error {comparison.error:.2g}, limit {comparison.limit:.2g}"
    if len(failures) > MAX_FAILURES:
        yield f"{'':{STATE_WIDTH}} and {len(failures) - MAX_FAILURES} more"


def measurement_lines(results: Sequence[CheckResult]) -> Iterator[str]:
    """Yield one line per group of measurements."""
    measurements = [measurement for result in results for measurement in result.measurements]
    for group in dict.fromkeys(measurement.group for measurement in measurements):
        members = [measurement for measurement in measurements if measurement.group == group]
        yield f"{group} ({members[0].unit}): " + ", ".join(map(_value, members))


def conclusion(results: Sequence[CheckResult]) -> str:
    """Return the last line."""
    names = [result.check.name for result in results if result.state not in ("ok", "skipped")]
    if not names:
        return "All checks passed."
    count = "1 check" if len(names) == 1 else f"{len(names)} checks"
    return f"{count} did not pass ({', '.join(names)}). Please open an issue with `kimi-mlx doctor --gpu --json`."


def is_ok(results: Sequence[CheckResult]) -> bool:
    """Return whether no check failed."""
    return all(result.state in ("ok", "skipped") for result in results)


def to_dict(description: Mapping[str, Any], results: Sequence[CheckResult]) -> dict[str, Any]:
    """Return the report for JSON."""
    return {"ok": is_ok(results), "device": dict(description), "checks": [result.to_dict() for result in results]}


def _summary(result: CheckResult, num_failures: int) -> str:
    count, worst = len(result.comparisons), result.worst
    if worst is None:
        return f"{len(result.measurements)} values"
    if num_failures:
        return f"{num_failures} of {count} comparisons beyond the limit"
    share = f", the worst at {100 * worst.error / worst.limit:.0f} % of its limit" if worst.limit else ""
    return f"{count} comparison{'s' * (count > 1)}{share}"


def _value(measurement: Measurement) -> str:
    number = f"{measurement.value:.3g}" if measurement.value < 1000 else f"{measurement.value:.0f}"
    return f"{measurement.name} {number}"
