"""Measure the SSDs of hosts, all at the same time: kimi_mlx.cluster.doctor.ssd_probe runs on each."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kimi_mlx.cluster.hosts.ssh import ScriptResult, run_script
from kimi_mlx.sizing.ssd import SsdSpeed

MODULE = "kimi_mlx.cluster.doctor.ssd_probe"

LIMIT_S = 90.0
"""Time limit: login, writing a file of 1 GB, and four measurements."""


@dataclass(frozen=True)
class SsdRequest:
    """What to measure on a host.

    Args:
        python: path of its interpreter.
        block_bytes: bytes of each read.
        scratch: folder for a temporary file.
        folders: folders with files of the model.
    """

    python: str
    block_bytes: int
    scratch: str
    folders: Sequence[str] = ()

    @property
    def script(self) -> str:
        """Shell script that measures."""
        words = [self.python, "-m", MODULE, "--block", str(self.block_bytes), "--scratch", self.scratch, *self.folders]
        return f"exec {shlex.join(words)}\n"


def measure_ssds(requests: Mapping[str, SsdRequest]) -> dict[str, SsdSpeed | str]:
    """Return the speed of each host's SSD, or why it was not measured.

    Args:
        requests: what to measure, by host.
    """
    if not requests:
        return {}
    with ThreadPoolExecutor(len(requests)) as pool:
        scripts = [request.script for request in requests.values()]
        results = pool.map(run_script, requests, scripts, [LIMIT_S] * len(scripts))
        return {host: parse_result(result) for host, result in zip(requests, results, strict=True)}


def parse_result(result: ScriptResult) -> SsdSpeed | str:
    """Return what a host has printed: a speed, or why there is none."""
    if result.exit_code is None:
        return f"no answer within {LIMIT_S:.0f} s"
    lines = result.stdout.strip().splitlines()
    try:
        value = json.loads(lines[-1])
        return str(value["error"]) if "error" in value else SsdSpeed.from_dict(value)
    except (IndexError, ValueError, KeyError, TypeError):
        errors = result.stderr.strip().splitlines()
        return errors[-1] if errors else f"exit code {result.exit_code}"
