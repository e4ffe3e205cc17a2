"""The line that says how many experts are in memory, and what speed the planner expects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kimi_mlx.cluster.hosts.ssh import is_local
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.planner.expectation import Expectation, expect
from kimi_mlx.planner.machines import Machine, SsdRate, any_machine
from kimi_mlx.planner.model_shape import shape_of_config
from kimi_mlx.session.model_status import HostStatus, ModelDeployment
from kimi_mlx.session.session import Session
from kimi_mlx.sizing.hosts import usable_bytes
from kimi_mlx.sizing.ssd import THIS_HOST, saved_speeds
from kimi_mlx.units import format_count, format_gib

MIN_GAIN = 1.05
"""Ratio of memory from which a higher limit of the GPU is suggested."""

MANY_SEQUENCES = 64
"""Number of sequences at the same time that is not worth a word."""


def expectation_of(session: Session, deployment: ModelDeployment, config: ModelConfig) -> Expectation | None:
    """Return what to expect of a loaded model; None if all experts are in memory.

    Args:
        session: session with the model.
        deployment: the model and its hosts.
        config: dimensions of the model.
    """
    budgets = [memory.expert_budget for memory in session.status().memory]
    known = [budget for budget in budgets if budget is not None]
    if not known or len(known) < len(budgets):
        return None
    machines = _machines(deployment)
    has_rdma = deployment.cluster is not None and deployment.cluster.backend != "ring"
    return expect(shape_of_config(deployment.name, config), deployment.strategy, machines, known, has_rdma=has_rdma)


def describe_expectation(expected: Expectation) -> str:
    """Return the expectation as a sentence for people."""
    text = (
        f"{100 * expected.kept_share:.0f} % of the experts are in memory ({format_gib(expected.kept_bytes)} of "
        f"{format_gib(expected.all_bytes)}), the others are read from the SSD: "
    )
    rate, hits = (
        expected.decode_tok_per_s,
        f"assuming that {100 * expected.hit_rate:.0f} % of the choices are in memory",
    )
    if rate is None:
        text += f"no prediction for this machine ({hits})"
    else:
        text += f"{rate:.1f}" if rate >= 1 else f"{rate:.2f}"
        text += f" tok/s expected, {hits}"
    if expected.max_sequences >= MANY_SEQUENCES:
        return text
    return f"{text}; {format_count(expected.max_sequences, 'sequence')} at a time, because more would hardly gain speed"


def limit_hint(deployment: ModelDeployment) -> str | None:
    """Return how to give the GPU of this Mac more memory; None where that gives none.

    Args:
        deployment: a model on this machine.
    """
    host = deployment.machines[0]
    if host.gpu_limit_bytes is None or host.memory_bytes is None:
        return None
    usable = usable_bytes(host.memory_bytes)
    if usable < MIN_GAIN * host.gpu_limit_bytes:
        return None
    return (
        f"the GPU may use {format_gib(host.gpu_limit_bytes)}; `sudo sysctl iogpu.wired_limit_mb={usable // 1024**2}` "
        f"raises that to {format_gib(usable)} until the next restart, for more experts in memory"
    )


def _machines(deployment: ModelDeployment) -> Sequence[Machine]:
    """Return the machine of each rank; ranks that share a host get no chip, so that no speed is predicted for them."""
    hosts = {host.name: host for host in deployment.machines}
    names = deployment.hosts
    return [_machine(hosts.get(name, deployment.machines[0]), names.count(name)) for name in names]


def _machine(host: HostStatus, num_ranks: int) -> Machine:
    chip = host.chip if num_ranks == 1 else None
    machine = any_machine(host.name, chip, (host.memory_bytes or 0) // num_ranks, None)
    speed = saved_speeds().get(THIS_HOST if is_local(host.name) else host.name)
    return machine if speed is None else replace(machine, known_ssd=SsdRate(speed.best_bytes_per_s, "measured"))
