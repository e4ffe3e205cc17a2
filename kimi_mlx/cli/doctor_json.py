"""Report of the doctor as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from kimi_mlx.cluster.doctor.doctor import Diagnosis
from kimi_mlx.cluster.doctor.memory_need import ModelNeed
from kimi_mlx.cluster.doctor.self_test import SelfTest
from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.hosts.hostfile import to_json
from kimi_mlx.cluster.network.measure_networks import Link


def to_dict(diagnosis: Diagnosis, need: ModelNeed) -> dict[str, Any]:
    """Return the report for JSON."""
    hostfile = diagnosis.hostfile
    return {
        "ok": not diagnosis.has_problem,
        "model": need.name,
        "backend": diagnosis.backend,
        "hosts": {host: _host(diagnosis.facts.get(host)) for host in diagnosis.hosts},
        "findings": [asdict(finding) for finding in diagnosis.findings],
        "links": [_link(link) for link in diagnosis.links],
        "network": None if diagnosis.network is None else asdict(diagnosis.network),
        "hostfile": None if hostfile is None else json.loads(to_json(hostfile)),
        "self_test": None if diagnosis.self_test is None else _self_test(diagnosis.self_test),
        "ssds": {host: speed.to_dict() for host, speed in diagnosis.ssds.items()},
    }


SUMMARY = (
    "hostname",
    "system",
    "machine",
    "macos_version",
    "macos_build",
    "chip",
    "memory_bytes",
    "free_bytes",
    "wired_bytes",
    "wired_limit_mb",
    "stores_folder",
    "disk_free_bytes",
    "rdma_status",
    "firewall",
)
"""Facts of a host in JSON."""


def _host(facts: Facts | None) -> dict[str, Any] | None:
    """Return the facts of a host; None if it did not answer."""
    if facts is None:
        return None
    python = None if facts.python is None else asdict(facts.python)
    return {**{name: getattr(facts, name) for name in SUMMARY}, "python": python}


def _link(link: Link) -> dict[str, Any]:
    measured = None if link.speed is None else asdict(link.speed)
    return {**asdict(link.network), "measured": measured, "problems": list(link.problems)}


def _self_test(test: SelfTest) -> dict[str, Any]:
    timings = [
        {**asdict(timing), "size_bytes": timing.payload.size_bytes, "bytes_per_s": timing.bytes_per_s}
        for timing in test.timings
    ]
    return {"device": test.device, "timings": timings, "sums": test.sums and test.sums.to_dict()}
