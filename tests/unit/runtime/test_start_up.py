"""The start of a rank: no collective has a consumer on the compute stream, and the warm-up has no collective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.model.config import load_config
from kimi_mlx.parallel.all_reduce import tune_all_reduce
from kimi_mlx.parallel.group import MlxGroup, barrier, gather_on_host
from kimi_mlx.parallel.pipeline_communicator import PipelineCommunicator
from kimi_mlx.runtime.load import fingerprint, load_share
from kimi_mlx.runtime.prompt_cache import open_prompt_cache
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
    """

    def __init__(self) -> None:
        self.rank, self.size, self.has_fast_fence = 0, 2, False
        self.gathers = self.timed_sums = 0
        self.sums_since_gather = 8

    def gather(self, x: mx.array) -> Any:
        self.gathers += 1
        self.sums_since_gather = 0
        return HostOnly(np.stack([np.array(x)] * 2))

    def _count_sum(self, x: mx.array) -> mx.array:
        self.timed_sums += 1
        self.sums_since_gather += 1
        assert self.sums_since_gather <= 5, "sums that do not follow a barrier"  # 4 are timed, and 1 is read at once
        return x * 2

    sum = sum_gathered = all_sum = _count_sum


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_divisible(tmp_path_factory.mktemp("start"), "k2", layers=3)


@pytest.mark.parametrize("strategy", ["hybrid", "tensor", "expert", "pipeline"])
def test_no_collective_of_the_start_is_consumed_by_the_compute_stream(
    strategy: str, folder: Path, tmp_path: Path
) -> None:
    group, config = HostOnlyGroup(), load_config(folder)
    model = load_share(folder, config, "float32", group, strategy=strategy)
    loaded = group.gathers
    if strategy != "pipeline":
        assert tune_all_reduce(group, config.hidden_size, mx.float32) is not None
    sums = group.timed_sums
    blocks = open_prompt_cache(
        tmp_path, 10**8, model, fingerprint(folder, config, 0, 2, strategy), group, num_local_ranks=2
    )
    engine = Engine(model, blocks=blocks)
    engine.add(0, Request((1, 2, 3), sampling=Sampling(temperature=1.0)))  # the ranks agree on a seed
    gathers = group.gathers
    assert gathers > loaded
    warm_up(model)
    assert (group.gathers, group.timed_sums) == (gathers, sums)
    barrier(group)
    blocks.close()


def test_the_host_only_group_refuses_what_a_gpu_would_wait_for() -> None:
    group = HostOnlyGroup()
    assert gather_on_host(group, [1, 2]).min(axis=0).tolist() == [1, 2]
    with pytest.raises((AttributeError, TypeError)):
        group.gather(mx.array([1, 2])).min(axis=0)


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
    communicator = PipelineCommunicator(LazyLinks(), 8, mx.float32)
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
    communicator = PipelineCommunicator(links, 8, mx.float32)
    communicator.set_header(0, 0)
    communicator.expect_long_steps()
    hidden = communicator.send_to_next_stage(mx.zeros((1, 4, 8)), mx.zeros((1, 4), mx.int32), 1)
    assert "Sort" not in graph_of(communicator.recv_last_hidden(hidden) + 1, folder=tmp_path)
