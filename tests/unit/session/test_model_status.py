"""The status of a model: what each rank holds, and its form as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kimi_mlx.cluster.hosts.host import local_cluster
from kimi_mlx.engine.prompt_cache.usage import CacheUsage
from kimi_mlx.model.config import load_config
from kimi_mlx.planner.model_shape import known_shape
from kimi_mlx.session.model_status import ModelDeployment, ModelStatus, model_status
from kimi_mlx.session.prompt_cache_status import PromptCacheStatus
from kimi_mlx.session.session import RankMemory, Restart, SessionStatus
from tests.fakes import KIMI_MINI, FixedSession

K2 = known_shape("kimi-k2").config


class ReportingSession(FixedSession):
    def __init__(self, status: SessionStatus):
        super().__init__([])
        self._status = status

    def status(self) -> SessionStatus:
        return self._status


def status_of(strategy: str, ranks: int = 2, status: SessionStatus | None = None) -> ModelStatus:
    deployment = ModelDeployment("kimi-k2", strategy, local_cluster(ranks), K2)
    return model_status(deployment, ReportingSession(status or SessionStatus(is_up=True)))


@pytest.mark.parametrize(
    ("strategy", "shares"),
    [
        ("hybrid", ["50% of each expert", "50% of each expert"]),
        ("tensor", ["heads 0-31 of 64, 50% of each expert", "heads 32-63 of 64, 50% of each expert"]),
        ("expert", ["experts 0-191 of 384", "experts 192-383 of 384"]),
        ("pipeline:3:1", ["layers 0-45 of 61, embedding and head", "layers 46-60 of 61"]),
    ],
)
def test_each_rank_says_what_it_holds(strategy: str, shares: list[str]) -> None:
    status = status_of(strategy)
    assert [rank.share for rank in status.ranks] == shares
    assert status.placement == f"{strategy} on 2 ranks: localhost"


@pytest.mark.parametrize("strategy", ["hybrid", "tensor", "expert", "pipeline"])
def test_split_axes_are_covered_once(strategy: str) -> None:
    status = status_of(strategy, ranks=3)
    for axis, total in status.dimensions.items():
        spans = [rank.holds[axis] for rank in status.ranks]
        is_split = len(set(spans)) > 1
        assert sum(stop - start for start, stop in spans) == total * (1 if is_split else 3)


def test_cache_is_counted_by_the_layers_of_each_rank() -> None:
    first, second = status_of("pipeline:3:1", status=SessionStatus(is_up=True, cached_tokens=1000)).ranks
    per_layer = 1000 * (K2.kv_lora_rank + K2.qk_rope_head_dim) * 2
    assert (first.cache_bytes, second.cache_bytes) == (46 * per_layer, 15 * per_layer)


def test_memory_and_restarts_come_from_the_session() -> None:
    memory = (RankMemory(10, 90, 50), RankMemory(20, 80))
    lost = Restart(1000.0, "rank 1 (`mac-b`) stopped", 12.5)
    state = SessionStatus(is_up=False, reason="restarting", restarts=1, memory=memory, restart_log=(lost,))
    status = status_of("hybrid", status=state)
    assert [(rank.memory_bytes, rank.free_bytes, rank.peak_memory_bytes) for rank in status.ranks] == [
        (10, 90, 50),
        (20, 80, None),
    ]
    assert (status.is_up, status.reason, tuple(status.restarts)) == (False, "restarting", (lost,))
    assert ModelStatus.from_dict(json.loads(json.dumps(status.to_dict()))) == status


def test_the_prompt_cache_is_summed_over_the_ranks() -> None:
    usages = (CacheUsage(1000, 300, 200, 4, 40, 400), CacheUsage(1000, 300, 200, 4, 30, 300))
    status = status_of("hybrid", status=SessionStatus(True, cache_usage=usages))
    assert status.prompt_cache == PromptCacheStatus(1000, 300, 200, 500, 0.5, True, 4, 70, 700)
    assert [rank.cache_disk_bytes for rank in status.ranks] == [40, 30]
    assert ModelStatus.from_dict(json.loads(json.dumps(status.to_dict()))) == status
    assert status_of("hybrid").prompt_cache == PromptCacheStatus()
    unused = status_of("hybrid", status=SessionStatus(True, cache_usage=(CacheUsage(),) * 2)).prompt_cache
    assert (unused.hit_rate, unused.has_disk) == (None, False)


def test_usage_continues_after_a_restart() -> None:
    usage = CacheUsage(10, 2, 3, 4, 5, 6).with_earlier(CacheUsage(100, 20, 30, 40, 50, 60))
    assert usage == CacheUsage(110, 22, 33, 4, 5, 6)
    assert CacheUsage.from_dict(json.loads(json.dumps(usage.to_dict()))) == usage


def test_one_process_holds_the_whole_model() -> None:
    config = load_config(KIMI_MINI)
    status = model_status(ModelDeployment("kimi-mini", "hybrid", None, config), ReportingSession(SessionStatus(True)))
    (rank,) = status.ranks
    size = sum(file.stat().st_size for file in KIMI_MINI.glob("*.safetensors"))
    assert rank.share == "the whole model"
    assert rank.weights_bytes == pytest.approx(size, rel=0.05)
    assert (status.backend, status.hosts) == ("process", [rank.host])


def test_a_document_of_another_version_can_be_read() -> None:
    document = status_of("hybrid").to_dict() | {"new": 1, "restarts": [{"at": 1, "reason": "x", "more": 2}]}
    document["ranks"][0]["new"] = 2
    status = ModelStatus.from_dict(document)
    assert status.restarts[0] == Restart(1, "x")
    assert ModelStatus.from_dict({"model": "other"}) == ModelStatus("other")


def test_too_many_ranks_for_a_prediction_still_have_a_status() -> None:
    config = replace(K2, num_hidden_layers=1)
    deployment = ModelDeployment("tiny", "pipeline", local_cluster(2), config)
    assert [rank.share for rank in model_status(deployment, ReportingSession(SessionStatus(True))).ranks] == ["", ""]
