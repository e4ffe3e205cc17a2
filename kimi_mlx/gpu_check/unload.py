"""Memory of MLX and of the system after a model was loaded, used and dropped."""

from __future__ import annotations

import gc
import shutil
import subprocess
import time

import mlx.core as mx

from kimi_mlx.cluster.hosts.probes import vm_stat
from kimi_mlx.gpu_check.context import Context
from kimi_mlx.gpu_check.random_model import RandomWeights, model_config, random_tokens
from kimi_mlx.model.device import device_kind

TOLERANCE_BYTES = 64 * 2**20
"""Tolerance for what MLX keeps, such as masks, and for what other processes wire meanwhile."""

TOLERANCE_FRACTION = 0.25
"""Tolerance of the system's counter of wired memory, which includes all processes, as a fraction of the model."""

WAIT_S = 60.0
"""Time limit for the system: releasing 300 GB takes seconds to a minute."""


def check(context: Context) -> None:
    """Load a model with wired memory, run it, drop it, and compare the memory before and after."""
    with context.on_device():
        mx.clear_cache()
        before, system_before = mx.get_active_memory(), system_bytes()
        is_metal = device_kind() == "metal"
        if is_metal:
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        context.progress("load")
        model = RandomWeights(model_config(context.sizes)).model(context.dtypes[-1])
        mx.eval(model(random_tokens(9, model.config.vocab_size)))
        loaded, system_loaded = mx.get_active_memory() - before, system_bytes()
        context.measure("memory of the model", "MLX", loaded / 1e6, "MB")
        if system_before is not None and system_loaded is not None:
            context.measure("memory of the model", "system", (system_loaded - system_before) / 1e6, "MB")
        context.progress("unload")
        started = time.perf_counter()
        del model
        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        if is_metal:
            mx.set_wired_limit(0)
        limit = TOLERANCE_BYTES + TOLERANCE_FRACTION * loaded
        context.report("bytes that MLX keeps", max(mx.get_active_memory() - before, 0), TOLERANCE_BYTES)
        if system_before is None or not is_metal:  # CUDA keeps freed memory for the process
            return
        deadline = started + WAIT_S
        while (left_bytes := (system_bytes() or 0) - system_before) > limit and time.perf_counter() < deadline:
            time.sleep(0.5)
        context.measure("time to unload", "model", time.perf_counter() - started, "s")
        context.report("bytes that the system keeps", max(left_bytes, 0), limit)


def system_bytes() -> int | None:
    """Return wired memory on macOS, or used memory of a CUDA device, of all processes; None elsewhere."""
    if device_kind() == "cuda":
        info = mx.device_info()
        return int(info["total_memory"]) - int(info["free_memory"])
    if shutil.which("vm_stat") is None:
        return None
    output = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=10, check=True).stdout
    return vm_stat(output)[1]
