"""Status of a loaded model for people and programs: its ranks, what each of them holds, memory, and restarts.

`/model` in a chat and `GET /v1/cluster` of the server show the same description. It is made from what this process
knows, without messages to the ranks.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.host import Cluster
from kimi_mlx.cluster.ring.watch import RankActivity
from kimi_mlx.errors import PlacementError
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.parallel.placement import RANGE_FIELDS, Placement, RankShare
from kimi_mlx.planner.model_shape import shape_of_config
from kimi_mlx.planner.portions import plan_placement, portion_of
from kimi_mlx.session.prompt_cache_status import PromptCacheStatus, prompt_cache_status
from kimi_mlx.session.session import RankMemory, Restart, Session
from kimi_mlx.sizing.kv_cache import kv_bytes_per_token
from kimi_mlx.units import format_count
from kimi_mlx.version import __version__

AXIS_FIELDS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "experts": "n_routed_experts",
    "expert_rows": "moe_intermediate_size",
    "dense_rows": "intermediate_size",
    "vocab_rows": "vocab_size",
}
"""Axes of a placement in a status, each with the field of the configuration that is its size."""


@dataclass(frozen=True)
class HostStatus:
    """A host of the ranks when it was last checked. Unknown fields have their defaults.

    Args:
        name: name of the host.
        chip: name of its chip.
        memory_bytes: total memory.
        free_bytes: memory that was available to programs.
        gpu_limit_bytes: memory that its GPU may wire.
        macos_version: version of macOS; empty on other systems.
        versions: versions of kimi-mlx, MLX and Python, by name.
    """

    name: str
    chip: str = ""
    memory_bytes: int | None = None
    free_bytes: int | None = None
    gpu_limit_bytes: int | None = None
    macos_version: str = ""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class ModelDeployment:
    """A model and where it runs: the facts that do not change while a session is open.

    Args:
        name: name of the model for people.
        strategy: strategy of the placement.
        cluster: hosts of the ranks; None if the model is in this process.
        config: dimensions of the model.
        machines: hosts of the ranks.
        link: network between the hosts, as text; empty if there is none or it is not known.
        findings: function that returns the findings of the last checks without waiting for new ones, or None.
        started_at: Unix time in seconds at which the model was ready.
    """

    name: str
    strategy: str
    cluster: Cluster | None
    config: ModelConfig
    machines: tuple[HostStatus, ...] = ()
    link: str = ""
    findings: Callable[[], tuple[Finding, ...] | None] = lambda: None
    started_at: float = field(default_factory=time.time)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host of each rank."""
        return (platform.node(),) if self.cluster is None else tuple(host.ssh for host in self.cluster.hostfile.hosts)

    @property
    def backend(self) -> str:
        """Transport between the ranks; `process` without ranks."""
        return "process" if self.cluster is None else self.cluster.backend


@dataclass(frozen=True)
class RankStatus:
    """A rank: a process that holds a share of the model.

    Args:
        rank: number of the rank, from 0.
        host: name of its host.
        share: its share in words, such as `layers 0-30 of 61`.
        holds: start and stop of its range of each axis in AXIS_FIELDS; the sizes are in ModelStatus.dimensions.
        has_vision: whether it holds the vision tower.
        weights_bytes: size of its weights, from the dimensions; 0 if it is not known.
        cache_bytes: size of the KV caches now, from the number of cached tokens.
        cache_disk_bytes: size of its blocks of the prompt cache on disk.
        memory_bytes: memory that MLX used when the model was loaded; None if it is not known.
        free_bytes: memory that MLX could still use then; None if it is not known.
        peak_memory_bytes: peak memory at the end of the last answer; None before the first.
        work: its work, as its last heartbeat reported it: `idle`, `load`, `prefill` or `decode`; empty if it is
            not a process of its own.
        step: number of its steps so far; None if it is not known.
        last_message_s: seconds since its last message; None if it is not known.
        experts: counters of the experts that it reads from its disk; None if all of its experts are in memory.
    """

    rank: int
    host: str
    share: str = ""
    holds: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, "tuple[int, int]"])
    has_vision: bool = False
    weights_bytes: int = 0
    cache_bytes: int = 0
    cache_disk_bytes: int = 0
    memory_bytes: int | None = None
    free_bytes: int | None = None
    peak_memory_bytes: int | None = None
    work: str = ""
    step: int | None = None
    last_message_s: float | None = None
    experts: ExpertStats | None = None


@dataclass(frozen=True)
class ModelStatus:
    """Status of a model. Unknown fields have their defaults: a server of another version may report less.

    Args:
        model: name of the model.
        context_tokens: size of the context; 0 if it is not known.
        strategy: strategy of the placement; empty if it is not known.
        backend: transport between the ranks, such as `ring`; `process` if there is one process.
        placement: the placement in one line.
        link: network between the hosts, as text; empty if there is none or it is not known.
        all_reduce: how the ranks add their parts, as text; empty if it is not known.
        dimensions: size of each axis in RankStatus.holds.
        ranks: ranks in order.
        machines: hosts of the ranks.
        findings: findings of the last checks of the hosts; None if there were none.
        is_up: whether requests are answered.
        reason: reason for not being up.
        active: number of requests that are running.
        waiting: number of requests that have not started.
        cached_tokens: number of tokens in all KV caches.
        prompt_cache: use of the prompt cache, in memory and on disk.
        restarts: restarts of the ring, the newest last.
        started_at: Unix time in seconds at which the model was ready; 0 if it is not known.
        uptime_s: seconds since then.
        versions: versions of kimi-mlx, MLX and Python, by name.
        url: address of the server; None for a model that this process has loaded.
    """

    model: str
    context_tokens: int = 0
    strategy: str = ""
    backend: str = ""
    placement: str = ""
    link: str = ""
    all_reduce: str = ""
    dimensions: Mapping[str, int] = field(default_factory=dict[str, int])
    ranks: Sequence[RankStatus] = ()
    machines: Sequence[HostStatus] = ()
    findings: Sequence[Finding] | None = None
    is_up: bool = True
    reason: str | None = None
    active: int = 0
    waiting: int = 0
    cached_tokens: int = 0
    prompt_cache: PromptCacheStatus = field(default_factory=PromptCacheStatus)
    restarts: Sequence[Restart] = ()
    started_at: float = 0.0
    uptime_s: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    url: str | None = None

    @property
    def hosts(self) -> list[str]:
        """Names of the hosts, without duplicates."""
        return list(dict.fromkeys(rank.host for rank in self.ranks))

    def to_dict(self) -> dict[str, Any]:
        """Return the status as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ModelStatus:
        """Return the status in the output of to_dict, also of another version: unknown fields are ignored.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the value has another form.
        """
        known = _known_fields(cls, value)
        known["ranks"] = tuple(_read_rank(rank) for rank in value.get("ranks") or ())
        known["machines"] = tuple(HostStatus(**_known_fields(HostStatus, item)) for item in value.get("machines") or ())
        findings = value.get("findings")
        known["findings"] = (
            None if findings is None else tuple(Finding(**_known_fields(Finding, item)) for item in findings)
        )
        known["prompt_cache"] = PromptCacheStatus(**_known_fields(PromptCacheStatus, value.get("prompt_cache") or {}))
        known["restarts"] = tuple(Restart(**_known_fields(Restart, item)) for item in value.get("restarts") or ())
        return cls(**known)


def model_status(deployment: ModelDeployment, session: Session) -> ModelStatus:
    """Return the status of a loaded model.

    Args:
        deployment: the model and its hosts.
        session: its session.
    """
    config, hosts = deployment.config, deployment.hosts
    status = session.status()
    try:
        placement = plan_placement(deployment.strategy, shape_of_config(deployment.name, config), len(hosts))
    except PlacementError:  # a checkpoint whose groups allow splits that the planner does not expect
        placement = None
    memory = status.memory or (RankMemory(),) * len(hosts)
    has_vision = session.image_error is None
    ranks = [
        _rank_status(deployment, placement, rank, memory[rank], status.cached_tokens, has_vision)
        for rank in range(len(hosts))
    ]
    if status.cache_usage:
        pairs = zip(ranks, status.cache_usage, strict=True)
        ranks = [replace(rank, cache_disk_bytes=usage.disk_bytes) for rank, usage in pairs]
    ranks = [replace(rank, experts=status.experts.get(rank.rank)) for rank in ranks]
    return ModelStatus(
        model=deployment.name,
        context_tokens=session.context,
        strategy=deployment.strategy,
        backend=deployment.backend,
        placement=describe_placement(deployment),
        link=deployment.link,
        all_reduce=status.all_reduce or "",
        dimensions=_dimensions(config),
        ranks=tuple(_with_activity(rank, status.activity) for rank in ranks),
        machines=deployment.machines,
        findings=deployment.findings(),
        is_up=status.is_up,
        reason=status.reason,
        active=status.active,
        waiting=status.waiting,
        cached_tokens=status.cached_tokens,
        prompt_cache=prompt_cache_status(status.cache_usage),
        restarts=status.restart_log,
        started_at=deployment.started_at,
        uptime_s=time.time() - deployment.started_at,
        versions=versions(),
    )


def describe_placement(deployment: ModelDeployment) -> str:
    """Return a placement in one line, such as `hybrid on 2 ranks: mac-a, mac-b`."""
    hosts = deployment.hosts
    if deployment.cluster is None:
        return f"one process on {hosts[0]}"
    names = ", ".join(dict.fromkeys(hosts))
    return f"{deployment.strategy} on {format_count(len(hosts), 'rank')}: {names}"


def describe_share(share: RankShare, placement: Placement, dimensions: Mapping[str, int]) -> str:
    """Return the share of a rank in words: only the large parts that the placement splits.

    Args:
        share: share of the rank.
        placement: placement with this share.
        dimensions: size of each axis.
    """
    if placement.world_size == 1:
        return "the whole model"
    parts = [
        f"{axis} {span.start}-{span.stop - 1} of {dimensions[axis]}"
        for axis in ("layers", "heads", "experts")
        if placement.is_sharded(axis) and len(span := share.range_of(axis))
    ]
    if placement.is_sharded("expert_rows"):
        parts.append(f"{len(share.expert_rows) / max(dimensions['expert_rows'], 1):.0%} of each expert")
    if placement.is_sharded("layers") and len(share.vocab_rows):
        parts.append("embedding and head")
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Return the versions of kimi-mlx, MLX and Python in this process."""
    found = {"kimi-mlx": __version__, "python": platform.python_version()}
    with suppress(PackageNotFoundError):  # a front on a machine without MLX
        found["mlx"] = version("mlx")
    return found


def _dimensions(config: ModelConfig) -> dict[str, int]:
    return {axis: getattr(config, name) for axis, name in AXIS_FIELDS.items()}


def _rank_status(
    deployment: ModelDeployment,
    placement: Placement | None,
    rank: int,
    memory: RankMemory,
    cached_tokens: int,
    has_vision: bool,
) -> RankStatus:
    measured = RankStatus(
        rank,
        deployment.hosts[rank],
        memory_bytes=memory.memory_bytes,
        free_bytes=memory.free_bytes,
        peak_memory_bytes=memory.peak_memory_bytes,
    )
    if placement is None:
        return measured
    config, share = deployment.config, placement.shares[rank]
    shape = shape_of_config(deployment.name, config)
    ranges = {axis: share.range_of(axis) for axis in RANGE_FIELDS if axis in AXIS_FIELDS}
    return replace(
        measured,
        share=describe_share(share, placement, _dimensions(config)),
        holds={axis: (span.start, span.stop) for axis, span in ranges.items()},
        has_vision=share.has_vision and has_vision,
        weights_bytes=round(portion_of(share, shape).held(shape.bytes, shape)),
        cache_bytes=cached_tokens * kv_bytes_per_token(config, len(share.layers)),
    )


def _with_activity(rank: RankStatus, activity: Sequence[RankActivity]) -> RankStatus:
    """Add the work of a rank of a ring, as its last message reported it."""
    if not activity:
        return rank
    now = activity[rank.rank]
    memory_bytes = rank.memory_bytes if now.memory_bytes is None else now.memory_bytes
    return replace(rank, memory_bytes=memory_bytes, work=now.work, step=now.step, last_message_s=now.last_message_s)


def _read_rank(value: Mapping[str, Any]) -> RankStatus:
    known = _known_fields(RankStatus, value)
    holds = {name: (int(start), int(stop)) for name, (start, stop) in (value.get("holds") or {}).items()}
    experts = value.get("experts")
    known["experts"] = None if experts is None else ExpertStats(**_known_fields(ExpertStats, experts))
    return RankStatus(**{**known, "holds": holds})


def _known_fields(kind: type[Any], value: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: value[item.name] for item in fields(kind) if item.name in value}
