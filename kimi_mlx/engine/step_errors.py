"""Explain a failed step of the model."""

from __future__ import annotations

import re

from kimi_mlx.errors import StepError

OUT_OF_MEMORY = re.compile(
    r"unable to allocate|attempting to allocate|insufficient memory|out.?of.?memory|bad_alloc", re.IGNORECASE
)
"""Messages of MLX's allocators (CPU, Metal, CUDA) and of Metal's command buffers when memory runs out."""


def step_error(error: Exception) -> StepError:
    """Return the error for the requests of a failed step; only a lack of memory is explained as such."""
    is_out_of_memory = isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)) is not None
    remedy = "a shorter prompt needs less memory" if is_out_of_memory else "if it fails again, report it as a bug"
    return StepError(f"a step of the model failed: {str(error) or type(error).__name__}", hint=f"try again; {remedy}")
