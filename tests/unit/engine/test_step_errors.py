"""A failed step is explained as lack of memory only if memory ran out."""

from __future__ import annotations

import pytest

from kimi_mlx.engine.step_errors import step_error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[malloc] Unable to allocate 9 bytes."),
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer"),
        RuntimeError(
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
        ),
        RuntimeError("cudaMallocAsync(&ptr, size) failed: out of memory"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_lack_of_memory_is_explained(error: Exception) -> None:
    assert step_error(error).hint == "try again; a shorter prompt needs less memory"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("[quantized_matmul] The shapes do not match."),
        RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error"),
        RuntimeError("There is no Stream(gpu, 0) in current thread."),
        AssertionError(),
    ],
)
def test_other_errors_are_not_explained_as_lack_of_memory(error: Exception) -> None:
    failure = step_error(error)
    assert "memory" not in failure.message + (failure.hint or "")
    assert failure.message != "a step of the model failed: "
