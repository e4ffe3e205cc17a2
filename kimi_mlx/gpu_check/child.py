"""The process of one check: `python -m kimi_mlx.gpu_check.child NAME DEVICE SIZES`.

It writes its results to stdout, one JSON object per line. With `describe` as NAME, it describes the device instead.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import sys
import threading
from importlib.metadata import version
from typing import Any, TextIO, cast

import mlx.core as mx

from kimi_mlx.gpu_check.checks import FULL, SMALL, Device
from kimi_mlx.gpu_check.context import Context
from kimi_mlx.model.device import device_kind, has_gpu
from kimi_mlx.version import __version__

SIZES = {"full": FULL, "small": SMALL}


def main() -> None:
    """Run the check and report; an exception ends the process with a traceback on stderr."""
    # What MLX or a library prints goes to stderr, before a traceback that follows it.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    threading.Thread(target=_end_with_parent, daemon=True).start()
    name, device, sizes = sys.argv[1:]

    def send(message: dict[str, Any]) -> None:
        _write(output, message)

    if name == "describe":
        send({"kind": "device", "device": describe(cast(Device, device))})
        return
    mx.set_default_device(mx.cpu)  # pyright: ignore[reportArgumentType]
    importlib.import_module(f"kimi_mlx.gpu_check.{name}").check(Context(cast(Device, device), SIZES[sizes], send))
    send({"kind": "done"})


def describe(device: Device) -> dict[str, Any]:
    """Return the device and versions; `has_device` is False if MLX cannot use it."""
    versions = {
        "kimi_mlx": __version__,
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "system": f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform(),
    }
    if device == "gpu" and not has_gpu():
        return {"has_device": False, "versions": versions}
    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)  # pyright: ignore[reportArgumentType]
    info = mx.device_info()
    return {
        "has_device": True,
        "kind": device_kind(),
        "name": str(info.get("device_name", "")),
        "memory_bytes": int(info.get("memory_size", info.get("total_memory", 0))),
        "info": {key: info[key] for key in sorted(info)},
        "versions": versions,
    }


def _end_with_parent() -> None:
    """End this process and its children when the parent closes stdin."""
    while os.read(0, 1):  # not sys.stdin, whose lock this thread would hold at the end of the process
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGTERM)


def _write(output: TextIO, message: dict[str, Any]) -> None:
    output.write(json.dumps(message) + "\n")
    output.flush()


if __name__ == "__main__":
    main()
