"""Release the memory of a model at the end of its process or session."""

from __future__ import annotations

import gc
import traceback

import mlx.core as mx


def release_memory() -> int:
    """Free everything that is no longer referenced, also on the GPU; return the bytes that MLX still holds.

    A process that is killed while it holds wired memory can take that memory from a Mac until it restarts. Drop all
    references to the model before, also those of exceptions: see `clear_frames`.
    """
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    if mx.metal.is_available():
        mx.set_wired_limit(0)
    return mx.get_active_memory()


def clear_frames(error: BaseException | None) -> None:
    """Clear the local variables of the functions that an exception has left; they may hold the model."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
