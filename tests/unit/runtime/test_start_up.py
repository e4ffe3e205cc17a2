"""The start of a rank: no collective has a consumer on the compute stream, and the warm-up has no collective."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.cluster.channel.messages import Message
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.all_reduce import tune_all_reduce
from kimi_mlx.parallel.group import MlxGroup, gather_on_host
from kimi_mlx.parallel.pipeline_communicator import PipelineCommunicator
from kimi_mlx.parallel.placement import Range
from kimi_mlx.rank import main as rank
from kimi_mlx.rank.channel import Channel
from kimi_mlx.runtime.load import load_share
from kimi_mlx.runtime.warm_up import warm_up
from tests.divisible import write_divisible


class HostOnly:
    """A result that can only be read on the CPU; any operation on it is an error."""

    def __init__(self, values: np.ndarray):
        self._values = values

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        return self._values


class HostOnlyGroup(MlxGroup):
    """Rank 0 of two that receives its own data back, but only on the CPU.

    Sums are allowed right after a gather, in which no rank is late any more: the choice of all-reduce times them.
    `is_late`: the other rank may be late, because work of its own precedes the next collective.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.has_fast_fence = 0, 2, False
        self.gathers = self.timed_sums = 0
        self.sums_since_gather = 8
        self.is_late = self.may_sum = True

    def gather(self, x: mx.array) -> Any:
        self.gathers += 1
        self.sums_since_gather = 0
        self.is_late = False
        return HostOnly(np.stack([np.array(x)] * 2))

    def _count_sum(self, x: mx.array) -> mx.array:
        self.timed_sums += 1
        self.sums_since_gather += 1
        assert self.may_sum, "a sum outside the choice of all-reduce"
        assert not self.is_late, "a sum whose sender may be late"
        assert self.sums_since_gather <= 5, "sums that do not follow a barrier"  # 4 are timed, and 1 is read at once
        return x * 2

    sum = sum_gathered = all_sum = _count_sum


class RecordingChannel(Channel):
    """A channel without a front. At `ready` and after loading, no rank may be late."""

    def __init__(self, group: HostOnlyGroup):
        super().__init__(BytesIO(), BytesIO())
        self._group = group
        self.sent: list[str] = []

    def send(self, kind: str, **fields: object) -> None:
        self.sent.append(kind)
        self._group.is_late = self._group.is_late or kind == "loading"
        assert kind != "ready" or not self._group.is_late, "no barrier after the warm-up"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_divisible(tmp_path_factory.mktemp("start"), "k2", layers=3)


def make_late(function: Callable[..., Any], group: HostOnlyGroup) -> Callable[..., Any]:
    """Return a function whose work takes longer on the other rank, and which must not communicate before it."""

    def late(*args: Any, **options: Any) -> Any:
        group.is_late = True
        return function(*args, **options)

    return late


@pytest.mark.parametrize("strategy", ["hybrid", "tensor", "expert", "pipeline"])
def test_no_collective_of_the_start_is_consumed_by_the_compute_stream(
    strategy: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = HostOnlyGroup()
    channel = RecordingChannel(group)
    group.may_sum = False
    gathers: list[int] = []

    def tune(*args: Any) -> Any:
        group.may_sum = True
        choice = tune_all_reduce(*args)
        group.may_sum = False
        return choice

    def warm(model: Model) -> None:
        before = (group.gathers, group.timed_sums)
        warm_up(model)
        assert (group.gathers, group.timed_sums) == before
        gathers.append(group.gathers)
        group.is_late = True

    monkeypatch.setattr(rank, "tune_all_reduce", tune)
    monkeypatch.setattr(rank, "warm_up", warm)
    monkeypatch.setattr(rank, "open_prompt_cache", make_late(rank.open_prompt_cache, group))
    start: Message = {
        "folder": str(folder),
        "strategy": strategy,
        "dtype": "float32",
        "needs_tokenizer_files": False,
        "speculate": 0,
        "draft_folder": None,
        "draft_name": None,
        "check_every": 0,
        "cache_dir": str(tmp_path),
        "cache_disk_bytes": 10**8,
        "cache_memory_bytes": None,
        "expert_memory": "auto",
        "cpu_slot": (0, 2),
    }
    engine = rank.load_engine(channel, start, group)
    assert channel.sent[-1] == "ready"
    assert (group.timed_sums > 0) == (strategy != "pipeline")
    assert group.gathers == gathers[0] + 1
    engine.add(0, Request((1, 2, 3), sampling=Sampling(temperature=1.0)))  # the ranks agree on a seed
    channel.cleanup.close()


def test_a_loaded_share_has_waited_for_the_other_ranks(folder: Path) -> None:
    group = HostOnlyGroup()

    def report(done: int, total: int) -> None:
        group.is_late = True

    load_share(folder, load_config(folder), "float32", group, report)
    assert not group.is_late


def test_the_host_only_group_refuses_what_a_gpu_would_wait_for() -> None:
    group = HostOnlyGroup()
    assert gather_on_host(group, [1, 2]).min(axis=0).tolist() == [1, 2]
    with pytest.raises((AttributeError, TypeError)):
        group.gather(mx.array([1, 2])).min(axis=0)


LAYERS = [Range(0, 1), Range(1, 2)]


class LazyLinks:
    """Neighbours whose messages are never there yet: a received array is a lazy sort of zeros."""

    rank, size = 1, 2

    def recv(self, like: mx.array, rank: int) -> mx.array:
        return mx.sort(like)

    def send(self, x: mx.array, rank: int) -> mx.array:
        return x

    def sum(self, x: mx.array) -> mx.array:
        return x

    def gather(self, x: mx.array) -> mx.array:
        return x[None]


def graph_of(*arrays: mx.array, folder: Path) -> str:
    path = folder / "graph.dot"
    mx.export_to_dot(str(path), *arrays)
    return path.read_text()


def test_what_a_prefill_step_receives_is_evaluated_before_layers_are_built_on_it(tmp_path: Path) -> None:
    communicator = PipelineCommunicator(LazyLinks(), 8, mx.float32, LAYERS)
    tokens = mx.zeros((1, 4), mx.int32)

    def receives_lazily(has_prefill: bool) -> bool:
        communicator.set_header(0, 0)
        if has_prefill:
            communicator.expect_long_steps()
        hidden = communicator.recv_from_previous_stage(tokens) + 1
        return "Sort" in graph_of(hidden, folder=tmp_path)

    assert receives_lazily(False)
    assert not receives_lazily(True)
    assert [receives_lazily(False) for _ in range(3)] == [False, False, True]  # steps in flight beside the prefill


def test_rank_0_evaluates_the_last_hidden_states_of_a_prefill(tmp_path: Path) -> None:
    links = LazyLinks()
    links.rank = 0
    communicator = PipelineCommunicator(links, 8, mx.float32, LAYERS)
    communicator.set_header(0, 0)
    communicator.expect_long_steps()
    hidden = communicator.send_to_next_stage(mx.zeros((1, 4, 8)), mx.zeros((1, 4), mx.int32), 1)
    assert "Sort" not in graph_of(communicator.recv_last_hidden(hidden) + 1, folder=tmp_path)
