"""The device that MLX computes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import mlx.core as mx

from kimi_mlx.model.device_traits import DeviceKind

F = TypeVar("F", bound=Callable[..., object])


def is_gpu() -> bool:
    """Return whether arrays are computed on a GPU, where `mx.fast` functions are single kernels."""
    return mx.default_device().type == mx.DeviceType.gpu


def has_gpu() -> bool:
    """Return whether MLX has a GPU on this machine."""
    gpu = mx.DeviceType.gpu
    return mx.is_available(gpu) and mx.device_count(gpu) > 0


def device_kind() -> DeviceKind:
    """Return the kind of the default device."""
    if not is_gpu():
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def compile_on_gpu(function: F, shapeless: bool = False) -> F:
    """Compile a function of arrays for calls on a GPU.

    On the CPU, also on that of a Mac, it runs as it is: mx.compile would call a C++ compiler at run time there, which
    takes 2 s and is not installed everywhere.
    """
    compiled = cast("Callable[..., object]", mx.compile(function, shapeless=shapeless))

    @wraps(function)
    def call(*args: Any) -> object:
        return compiled(*args) if is_gpu() else function(*args)

    return cast(F, call)


def elementwise(function: F) -> F:
    """Fuse elementwise operations into one kernel on a GPU."""
    return compile_on_gpu(function, shapeless=True)
