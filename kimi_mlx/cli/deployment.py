"""The deployment of a model: its hosts, their network, and the findings of the checks before the start."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.host import Cluster
from kimi_mlx.cluster.hosts.machine import gpu_limit, local_machine
from kimi_mlx.cluster.network.links import Network
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.session.model_status import HostStatus, ModelDeployment, versions

LOCALHOST = "localhost"
"""Name of this machine as the host of local ranks."""


def deployment_here(name: str, strategy: str, cluster: Cluster | None, config: ModelConfig) -> ModelDeployment:
    """Return the deployment of a model on this machine.

    Args:
        name: name of the model for people.
        strategy: strategy of the placement.
        cluster: local ranks; None if the model is in this process.
        config: dimensions of the model.
    """
    machine = local_machine()
    host = HostStatus(
        platform.node() if cluster is None else LOCALHOST,
        machine.chip,
        machine.memory_bytes,
        gpu_limit_bytes=machine.gpu_bytes if machine.is_mac else None,
        macos_version=platform.mac_ver()[0],
        versions=versions(),
    )
    return ModelDeployment(name, strategy, cluster, config, (host,))


def deployment_on_hosts(
    name: str, strategy: str, cluster: Cluster, config: ModelConfig, doctor: Mapping[str, Any]
) -> ModelDeployment:
    """Return the deployment of a model on launched hosts.

    Args:
        name: name of the model for people.
        strategy: strategy of the placement.
        cluster: hosts of the ranks.
        config: dimensions of the model.
        doctor: report of the checks, from doctor_json.to_dict.
    """
    network: Mapping[str, Any] | None = doctor.get("network")
    findings = tuple(Finding(**finding) for finding in doctor.get("findings") or ())
    hosts: Mapping[str, Mapping[str, Any] | None] = doctor.get("hosts") or {}
    machines = tuple(_host_status(host, facts) for host, facts in hosts.items())
    link = "" if network is None else str(Network(**network))
    return ModelDeployment(name, strategy, cluster, config, machines, link, lambda: findings)


def _host_status(name: str, facts: Mapping[str, Any] | None) -> HostStatus:
    if facts is None:
        return HostStatus(name)
    memory, is_mac = facts["memory_bytes"], facts["system"] == "Darwin"
    return HostStatus(
        name,
        facts["chip"] or facts["machine"] or "",
        memory,
        facts["free_bytes"],
        gpu_limit(memory, str(facts["wired_limit_mb"])) if is_mac and memory else None,
        facts["macos_version"] or "",
        _versions(facts["python"]),
    )


def _versions(python: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the versions that a host's interpreter has; none if it has no interpreter."""
    if python is None:
        return {}
    packages = {name: python["packages"][name] for name in ("kimi-mlx", "mlx") if name in python["packages"]}
    return {**packages, "python": python["version"]}
