"""The doctor's measurement of SSDs, for models whose experts do not all fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kimi_mlx.cluster.doctor.doctor import Diagnosis
from kimi_mlx.cluster.doctor.host_checks import check_ssd
from kimi_mlx.cluster.doctor.memory_need import ModelNeed
from kimi_mlx.cluster.doctor.run_checks import DoctorRequest
from kimi_mlx.cluster.doctor.ssd_test import SsdRequest, measure_ssds
from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.hosts.ssh import is_local
from kimi_mlx.errors import UsageError
from kimi_mlx.planner.machines import machine_of_host
from kimi_mlx.sizing.ssd import THIS_HOST, SsdSpeed, save_speeds
from kimi_mlx.store.locate import config_folder
from kimi_mlx.store.model_ref import resolve_model_name

MIN_EXPERT_BYTES = 10**6
"""Size of an expert from which its model is large enough to be read from an SSD."""


def with_ssds(
    diagnosis: Diagnosis, request: DoctorRequest, need: ModelNeed, report: Callable[[str], None]
) -> Diagnosis:
    """Return a diagnosis with the speeds of the hosts' SSDs, which are saved for `kimi-mlx plan`.

    Only hosts that the model does not fit on are measured, and none for small models.

    Args:
        diagnosis: diagnosis of the hosts.
        request: hosts and model of the diagnosis.
        need: what the model needs with its placement.
        report: callback for progress messages.
    """
    requests: dict[str, SsdRequest] = {}
    for host, facts in diagnosis.facts.items():
        ranks = request.ranks[host] if need.by_rank else []
        block_bytes = max((need.by_rank[rank].expert_bytes for rank in ranks), default=0)
        if facts.python is None or block_bytes < MIN_EXPERT_BYTES or not _is_short(diagnosis, host):
            continue
        scratch = facts.stores_folder or facts.data_folder or facts.home or "/tmp"
        requests[host] = SsdRequest(facts.python.path, block_bytes, scratch, _folders(facts, need, ranks))
    if not requests:
        return diagnosis
    report(f"measuring the SSD of {', '.join(requests)}")
    results = measure_ssds(requests)
    speeds = {host: speed for host, speed in results.items() if isinstance(speed, SsdSpeed)}
    save_speeds({THIS_HOST if is_local(host) else host: speed for host, speed in speeds.items()})
    findings = [check_ssd(host, result, _expected(diagnosis.facts[host])) for host, result in results.items()]
    return replace(diagnosis, findings=(*diagnosis.findings, *findings), ssds=speeds)


def _is_short(diagnosis: Diagnosis, host: str) -> bool:
    """Return whether the model does not fit in the memory of a host."""
    checks = ("memory", "wired limit")
    return any(
        finding.host == host and finding.check in checks and finding.state != "ok" for finding in diagnosis.findings
    )


def _folders(facts: Facts, need: ModelNeed, ranks: list[int]) -> list[str]:
    """Return the folders with the model's files on a host, as far as they are known."""
    stores = [
        f"{facts.stores_folder}/{store.folder}"
        for store in facts.stores
        if store.repository == need.repository and store.rank in ranks
    ]
    if stores or not is_local(facts.host):
        return stores
    folder = config_folder(resolve_model_name(need.name))
    return [] if folder is None else [str(folder)]


def _expected(facts: Facts) -> float | None:
    """Return the rate of a host's SSD that is published for its chip, or usual for a Mac; None for other machines."""
    try:
        return machine_of_host(facts.host, facts.chip, facts.memory_bytes, None).ssd.bytes_per_s
    except UsageError:
        return None
