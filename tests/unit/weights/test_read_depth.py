"""The number of pieces that are read at the same time follows from the rates of the first reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.model.config import load_config
from kimi_mlx.uncached_file import UncachedFile
from kimi_mlx.weights import read_depth
from kimi_mlx.weights.expert_reader import ExpertReader
from kimi_mlx.weights.expert_source import checkpoint_sources
from kimi_mlx.weights.read_depth import DEFAULT_DEPTH, DEPTHS, MIN_GAIN, DepthTrial
from kimi_mlx.weights.reader import open_checkpoint
from tests.experts import new_destination
from tests.fakes import KIMI_MINI

PIECE = 4 << 20


class Disk:
    """A disk with a rate for each depth, in bytes per second."""

    def __init__(self, rates: Sequence[float]):
        self.rates: dict[int, float] = dict(zip(DEPTHS, rates, strict=True))
        self.now_s = 0.0
        self.trial = DepthTrial(lambda: self.now_s)

    def read(self, seconds: float) -> None:
        """Read pieces for a time, at the depth that the trial wants."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += PIECE / self.rates[self.trial.depth]
            self.trial.add(PIECE)


@given(st.tuples(*(st.floats(0.5e9, 10e9) for _ in DEPTHS)))
def test_the_smallest_of_the_fastest_depths_is_chosen(rates: tuple[float, ...]) -> None:
    disk = Disk(rates)
    disk.read(10)
    fastest = max(disk.rates.values())
    assert disk.trial.depth == disk.trial.best
    assert disk.rates[disk.trial.best] >= fastest / MIN_GAIN * 0.999
    assert all(rate < fastest / MIN_GAIN * 1.001 for depth, rate in disk.rates.items() if depth < disk.trial.best)


def test_too_few_reads_change_nothing() -> None:
    disk = Disk((1e9, 1e9, 8e9))
    disk.read(0.5)
    assert disk.trial.best == DEFAULT_DEPTH


def test_time_without_reads_does_not_count() -> None:
    disk = Disk((1e9, 1.2e9, 1.5e9))
    for _ in range(8):
        disk.read(0.5)
        disk.now_s += 5
        disk.trial.restart_window()
    assert disk.trial.best == DEPTHS[-1]


def test_reads_of_experts_keep_to_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    read, lock = UncachedFile.read, threading.Lock()
    running, most_running = 0, 0

    def slow(self: UncachedFile, buffers: Sequence[np.ndarray], offset: int) -> int:
        nonlocal running, most_running
        with lock:
            running += 1
            most_running = max(most_running, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        return read(self, buffers, offset)

    reader = open_experts(KIMI_MINI)
    monkeypatch.setattr(UncachedFile, "read", slow)
    monkeypatch.setattr(read_depth, "WINDOW_S", 0.01)
    arrays = reader.arrays(1)
    destinations = [new_destination(arrays) for _ in range(4)]

    def read_many(count: int) -> None:
        reads = [reader.read(1, index % 16, destinations[index % 4]) for index in range(count)]
        for each in reads:
            each.result()

    with reader.choosing_depth():
        read_many(200)
    assert most_running == max(DEPTHS)
    assert reader.depth in DEPTHS
    most_running = 0
    read_many(40)
    assert most_running <= reader.depth
    reader.close()


def open_experts(folder: Path) -> ExpertReader:
    checkpoint = open_checkpoint(folder, load_config(folder)).checkpoint
    return ExpertReader(checkpoint_sources(checkpoint, None, ""), "F32")
