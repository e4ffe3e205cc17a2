"""Explain a failed step of the model."""

from __future__ import annotations

import re

from kimi_mlx.errors import KimiMlxError, StepError

OUT_OF_MEMORY = re.compile(
    r"unable to allocate|attempting to allocate|insufficient memory|out.?of.?memory|bad_alloc", re.IGNORECASE
)
"""Messages of MLX's allocators (CPU, Metal, CUDA) and of Metal's command buffers when memory runs out."""


def step_error(error: Exception) -> KimiMlxError:
    """Return the error for the requests of a failed step; our own errors, as of unreadable experts, are unchanged."""
    if isinstance(error, KimiMlxError):
        return error
    return _explain("a step of the model failed", error, "a shorter prompt needs less memory")


def encoding_error(error: Exception) -> KimiMlxError:
    """Return the error for the requests that need an image whose encoding has failed; our own errors are unchanged."""
    if isinstance(error, KimiMlxError):
        return error
    return _explain("an image could not be encoded", error, "a smaller image needs less memory")


def _explain(failure: str, error: Exception, memory_remedy: str) -> StepError:
    is_out_of_memory = isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)) is not None
    remedy = memory_remedy if is_out_of_memory else "if it fails again, report it as a bug"
    return StepError(f"{failure}: {str(error) or type(error).__name__}", hint=f"try again; {remedy}")
