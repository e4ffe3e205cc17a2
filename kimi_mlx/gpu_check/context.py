"""The context of a check: its device, its sizes, and functions that report its results."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import numpy as np

from kimi_mlx.gpu_check.checks import Comparison, Device, Measurement, Sizes


class Context:
    """Device, sizes and report of a check.

    Args:
        device: device to check.
        sizes: sizes of what to compute.
        send: function that receives each message, a dict with the key `kind`.
    """

    def __init__(self, device: Device, sizes: Sizes, send: Callable[[dict[str, Any]], None]):
        self.device, self.sizes, self._send = device, sizes, send

    @property
    def dtypes(self) -> tuple[mx.Dtype, ...]:
        """Types to compute in. At K2's widths a CPU takes hours in bfloat16."""
        if self.device == "cpu" and self.sizes.has_k2_widths:
            return (mx.float32,)
        return mx.float32, mx.bfloat16

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Compute on the checked device; elsewhere checks compute on the CPU."""
        mx.set_default_device(mx.gpu if self.device == "gpu" else mx.cpu)  # pyright: ignore[reportArgumentType]
        try:
            yield
        finally:
            mx.set_default_device(mx.cpu)  # pyright: ignore[reportArgumentType]

    def progress(self, text: str) -> None:
        """Report the current work."""
        self._send({"kind": "progress", "text": text})

    def compare(self, name: str, actual: mx.array, expected: mx.array, limit: float) -> None:
        """Compare rows, the last dimension, and report the largest relative error of any row.

        Args:
            name: what is compared.
            actual: array computed on the checked device.
            expected: array of the same shape.
            limit: largest error of a row.
        """
        self.report(name, float(row_errors(actual, expected).max()), limit)

    def report(self, name: str, error: float, limit: float) -> None:
        """Report an error and its limit."""
        self._send({"kind": "comparison", **asdict(Comparison(name, error, limit))})

    def require(self, name: str, is_true: bool) -> None:
        """Report a condition."""
        self.report(name, 0.0 if is_true else math.inf, 0.0)

    def measure(self, group: str, name: str, value: float, unit: str) -> None:
        """Report a number."""
        self._send({"kind": "measurement", **asdict(Measurement(group, name, value, unit))})

    def skip(self, reason: str) -> None:
        """Report that the check cannot run here."""
        self._send({"kind": "skipped", "text": reason})

    def median_s(self, run: Callable[[], Sequence[mx.array] | mx.array], repeats: int | None = None) -> float:
        """Return the median time of calling `run` and evaluating its result. One more run before is not counted."""
        times: list[float] = []
        mx.eval(run())
        for _ in range(repeats or self.sizes.repeats):
            started = time.perf_counter()
            mx.eval(run())
            times.append(time.perf_counter() - started)
        return statistics.median(times)


def row_errors(actual: mx.array, expected: mx.array) -> np.ndarray:
    """Return the norm of the difference of each row, relative to the norm of the expected row, in float64."""
    rows, reference = (
        np.array(array.astype(mx.float32)).astype(np.float64).reshape(-1, array.shape[-1])
        for array in (actual, expected)
    )
    norms = np.maximum(np.linalg.norm(reference, axis=-1), 1e-12)
    errors = np.linalg.norm(rows - reference, axis=-1) / norms
    return np.where(np.isnan(errors), np.inf, errors)
