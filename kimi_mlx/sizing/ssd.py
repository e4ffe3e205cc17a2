"""Measured speed of a host's SSD, as `kimi-mlx doctor` saves it for later runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kimi_mlx.files import write_atomically
from kimi_mlx.folders import cache_folder

FILE_NAME = "ssd.json"

THIS_HOST = "localhost"
"""Name of this machine in the file."""

ASSUMED_SSD_BYTES_PER_S = 6e9
"""Rate at which experts are read where neither a measured nor a published one is known."""


@dataclass(frozen=True)
class SsdSpeed:
    """Random reads of blocks of an expert's size, past the page cache.

    Args:
        folder: folder of the file that was read.
        block_bytes: size of each read.
        bytes_per_s: rate by the number of reads in flight.
        measured_at: Unix time in seconds.
    """

    folder: str
    block_bytes: int
    bytes_per_s: Mapping[int, float]
    measured_at: float

    @property
    def best_bytes_per_s(self) -> float:
        """Highest rate for any number of reads in flight."""
        return max(self.bytes_per_s.values())

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return {**asdict(self), "bytes_per_s": {str(depth): rate for depth, rate in self.bytes_per_s.items()}}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> SsdSpeed:
        """Read the output of to_dict; raise KeyError, TypeError or ValueError for anything else."""
        rates = {int(depth): float(rate) for depth, rate in dict(value["bytes_per_s"]).items()}
        if not rates or min(rates.values()) <= 0:
            raise ValueError("no rates")
        return cls(str(value["folder"]), int(value["block_bytes"]), rates, float(value["measured_at"]))


def save_speeds(speeds: Mapping[str, SsdSpeed]) -> None:
    """Save the speeds of hosts by name; those of other hosts are kept. Without a writable folder nothing is saved."""
    folder = cache_folder()
    if folder is None:
        return
    known = {**saved_speeds(), **speeds}
    text = json.dumps({host: speed.to_dict() for host, speed in known.items()}, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE_NAME, text.encode())
    except OSError:  # the next doctor measures again
        return


def saved_speeds() -> dict[str, SsdSpeed]:
    """Return the saved speeds by the name of the host; none if there is no readable file."""
    folder = cache_folder()
    if folder is None:
        return {}
    try:
        values: dict[str, Any] = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        return {host: SsdSpeed.from_dict(value) for host, value in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the doctor writes it again
        return {}
