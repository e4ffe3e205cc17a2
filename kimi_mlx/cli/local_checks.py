"""The doctor's cheap checks of this machine, for the status of a server that was started on it alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from kimi_mlx.cli.model_size import draft_shape, memory_requirement
from kimi_mlx.cli.open_model import OpenedModel, PreparedModel
from kimi_mlx.cli.placement import with_placement
from kimi_mlx.cluster.doctor.host_checks import check_cache_disk, check_disk, check_memory, check_wired_limit
from kimi_mlx.cluster.doctor.local_facts import local_facts
from kimi_mlx.cluster.doctor.memory_need import ModelNeed
from kimi_mlx.cluster.doctor.wired_memory import find_lost_memory
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.engine.prompt_cache.block_writer import RESERVE_BYTES
from kimi_mlx.files import free_disk_bytes
from kimi_mlx.sizing.expert_memory import ExpertMemory
from kimi_mlx.store.locate import stores_root

RECHECK_S = 600.0
"""Time after which the checks are made again when somebody reads the status."""


@dataclass
class LocalChecks:
    """Findings about this machine. They are made in the background, and again once they are old and are read.

    Args:
        host: name of this machine in the status.
        need: need of the model with its placement.
        ranks: number of ranks on this machine.
        held_bytes: function that returns the memory that the loaded model holds. It counts as free.
        cache_dir: folder of the prompt cache on disk; None if there is none.
    """

    host: str
    need: ModelNeed
    ranks: int
    held_bytes: Callable[[], int]
    cache_dir: Path | None = None
    _findings: tuple[Finding, ...] | None = None
    _next_check_at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def findings(self) -> tuple[Finding, ...] | None:
        """Return the newest findings without waiting; None before the first ones."""
        with self._lock:
            is_old = time.monotonic() >= self._next_check_at
            if is_old:
                self._next_check_at = time.monotonic() + RECHECK_S
        if is_old:
            threading.Thread(target=self._check, daemon=True).start()
        return self._findings

    def _check(self) -> None:
        self._findings = tuple(check_this_machine(self))


def check_this_machine(checks: LocalChecks) -> list[Finding]:
    """Check memory, the GPU's limit and disks."""
    facts = local_facts(checks.host)
    if facts.free_bytes is not None:
        facts = replace(facts, free_bytes=facts.free_bytes + checks.held_bytes())
    root = stores_root()
    facts = replace(facts, stores_folder=str(root), disk_free_bytes=_free_bytes(root))
    need = checks.need.memory(facts, range(checks.ranks), checks.ranks)
    lost = find_lost_memory()
    findings = [
        check_memory(facts, need, checks.need.weights_bytes),
        *([check_wired_limit(facts, need, checks.need.weights_bytes)] if facts.is_mac else []),
        *([] if lost is None else [replace(lost, host=checks.host)]),
        check_disk(facts, 0),
    ]
    if checks.cache_dir is not None:
        folder = checks.cache_dir.expanduser()
        findings.append(check_cache_disk(checks.host, str(folder), _free_bytes(folder), RESERVE_BYTES))
    return findings


def _free_bytes(folder: Path) -> int | None:
    try:
        return free_disk_bytes(folder)
    except OSError:
        return None


def with_local_checks(
    opened: OpenedModel, prepared: PreparedModel, ranks: int, cache_dir: Path | None, expert_memory: ExpertMemory
) -> OpenedModel:
    """Return a model with findings about this machine in its status, and begin to check.

    Launched hosts were checked before the start.

    Args:
        opened: the loaded model.
        prepared: the same before it was loaded.
        ranks: number of ranks on this machine.
        cache_dir: folder of the prompt cache on disk; None if there is none.
        expert_memory: memory for routed experts on each rank.
    """
    if prepared.launch is not None:
        return opened

    def held_bytes() -> int:
        return sum(memory.memory_bytes or 0 for memory in opened.session.status().memory)

    host = opened.deployment.machines[0].name
    draft = None if prepared.draft is None else draft_shape(str(prepared.draft), prepared.name)
    need = with_placement(memory_requirement(prepared.name), prepared.choice, ranks, draft, expert_memory)
    checks = LocalChecks(host, need, ranks, held_bytes, cache_dir)
    checks.findings()
    return replace(opened, deployment=replace(opened.deployment, findings=checks.findings))
