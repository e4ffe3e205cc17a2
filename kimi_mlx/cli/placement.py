"""Choose the strategy of a command: the user's, else that of the stores on disk, else the planner's choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from kimi_mlx.cli.model_size import model_shape
from kimi_mlx.cli.output import stderr
from kimi_mlx.cli.plan_hosts import chosen_link
from kimi_mlx.cluster.doctor.cluster_checks import kernel_difference
from kimi_mlx.cluster.doctor.doctor import Diagnosis
from kimi_mlx.cluster.doctor.memory_need import ModelNeed, RankNeed
from kimi_mlx.cluster.doctor.run_checks import DoctorRequest
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.parallel.placement import normalize_strategy
from kimi_mlx.planner.calibration import Calibration
from kimi_mlx.planner.chips import UNKNOWN_CHIP
from kimi_mlx.planner.choice import (
    Choice,
    by_calibration,
    by_rule,
    choose,
    choose_pipeline,
    memory_of,
    needs_calibration,
)
from kimi_mlx.planner.drafts import DraftShape
from kimi_mlx.planner.links import RDMA, LinkProfile
from kimi_mlx.planner.machines import Machine, any_machine
from kimi_mlx.planner.memory import HostMemory
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.sizing.expert_memory import AUTO, ExpertMemory
from kimi_mlx.store.locate import stored_strategy
from kimi_mlx.store.model_ref import ModelRef
from kimi_mlx.store.store_folders import folder_prefix, read_folder_name

SINGLE_RANK = Choice("hybrid", "one rank has the whole model")
"""The choice for a single rank; its reason is not printed."""

_ANY_MACHINE = Machine("", UNKNOWN_CHIP, 0, 0)
"""Machine of a rank on an unknown host; the memory that a rank needs does not depend on its host."""

OVERRIDES = "--strategy overrides the choice"
"""Reason for the user's own strategy."""

Calibrate = Callable[[ModelShape], Calibration | None]
"""Measures a layer of a model and messages between ranks; returns None if that fails."""


def choose_placement(
    target: ModelRef | None,
    ranks: int,
    requested: str | None,
    calibrate: Calibrate | None = None,
    shape: ModelShape | None = None,
    draft: DraftShape | None = None,
) -> Choice:
    """Choose the strategy of ranks on this machine.

    Args:
        target: the model; None for one that has no stores.
        ranks: number of ranks.
        requested: value of `--strategy`.
        calibrate: function that measures on these ranks; None to measure nothing.
        shape: dimensions of the model; None to look them up by its name.
        draft: draft model; None without one.

    Raises:
        UsageError: the weights of the strategy are for another number of ranks.
    """
    if requested is not None:
        return Choice(normalize_strategy(requested, ranks), OVERRIDES)
    if ranks == 1:
        return SINGLE_RANK
    if target is not None and (stored := stored_strategy(target, ranks)) is not None:
        return Choice(stored, "as it is stored on this machine")
    # The planner assumes one rank per chip, so it cannot predict several on one machine.
    if calibrate is not None:
        shape = shape or (None if target is None else _shape(target.name))
        if (choice := _calibrated(calibrate, shape, (), None, draft)) is not None:
            return choice
    return by_rule(None, (), None, "the usual choice for ranks on one machine; nothing was measured")


def _calibrated(
    calibrate: Calibrate,
    shape: ModelShape | None,
    machines: Sequence[Machine],
    link: LinkProfile | None,
    draft: DraftShape | None = None,
) -> Choice | None:
    """Measure and choose, if there is no prediction; return None if there is one or nothing can be measured."""
    if shape is None or not needs_calibration(shape, machines, link):
        return None
    calibration = calibrate(shape)
    return None if calibration is None else by_calibration(calibration, shape, machines, draft)


def choose_placement_on_hosts(
    diagnosis: Diagnosis,
    request: DoctorRequest,
    requested: str | None,
    draft: DraftShape | None = None,
    calibrate: Calibrate | None = None,
    expert_memory: ExpertMemory = AUTO,
) -> Choice:
    """Choose the strategy of ranks on hosts.

    Args:
        diagnosis: diagnosis of the hosts.
        request: hosts and model of the diagnosis.
        requested: value of `--strategy`.
        draft: draft model; None without one.
        calibrate: function that measures on the ranks where nothing can be predicted; None to measure nothing.
        expert_memory: memory for routed experts on each rank.

    Raises:
        UsageError: the weights of the strategy are for another number of ranks.
    """
    size = request.world_size
    shape = _shape(request.need.name)
    machines = _machines(diagnosis, request)
    if size == 1:
        return replace(SINGLE_RANK, memory=memory_of(SINGLE_RANK.strategy, shape, machines, draft) if machines else ())
    difference = kernel_difference([*diagnosis.facts.values()])
    if requested is not None:
        strategy, reason = normalize_strategy(requested, size), OVERRIDES
    elif (stored := _stored_on(diagnosis, request)) is not None and (
        difference is None or stored.startswith("pipeline")
    ):
        strategy, reason = stored, "as it is stored on the hosts"
    elif difference is not None:
        return choose_pipeline(shape if machines else None, machines, difference, draft)
    elif (
        calibrate is not None
        and (choice := _calibrated(calibrate, shape, machines, _link(diagnosis), draft)) is not None
    ):
        return choice
    elif not machines:
        return by_rule(None, (), _link(diagnosis), "the hosts' memory is not known")
    else:
        return choose(
            shape,
            machines,
            _link(diagnosis),
            is_fast_sync=request.hostfile.has_fast_sync,
            draft=draft,
            expert_memory=expert_memory,
        )
    return Choice(strategy, reason, memory_of(strategy, shape, machines, draft) if machines else ())


def with_placement(
    need: ModelNeed,
    choice: Choice,
    ranks: int,
    draft: DraftShape | None = None,
    expert_memory: ExpertMemory = AUTO,
) -> ModelNeed:
    """Return the memory need of a model with the chosen placement on each host: that of `kimi-mlx plan`.

    Args:
        need: the model.
        choice: the placement.
        ranks: number of ranks.
        draft: draft model; None without one.
        expert_memory: memory for routed experts on each rank.
    """
    memory = choice.memory or memory_of(choice.strategy, _shape(need.name), [_ANY_MACHINE] * ranks, draft)
    by_rank = tuple(_rank_need(host, expert_memory) for host in memory)
    return replace(need, store_prefix=folder_prefix(choice.strategy, ranks), by_rank=by_rank)


def _rank_need(host: HostMemory, expert_memory: ExpertMemory) -> RankNeed:
    need = RankNeed(host.weights_bytes, host.other_bytes, expert_bytes=host.expert_bytes)
    if expert_memory.mode == "all":
        return need
    budget_bytes = expert_memory.num_bytes
    if expert_memory.share is not None:
        budget_bytes = round(expert_memory.share * host.experts_bytes)
    staging_bytes = host.smallest_bytes - (host.needed_bytes - host.experts_bytes)
    return replace(need, experts_bytes=host.experts_bytes, staging_bytes=staging_bytes, budget_bytes=budget_bytes)


def print_placement(choice: Choice, where: str, is_quiet: bool = False) -> None:
    """Print the chosen strategy and the reason, before anything is loaded."""
    if choice.reason != SINGLE_RANK.reason and not is_quiet:
        stderr.print(f"{choice.strategy} over {where}: {choice.reason}", style="dim", markup=False)


def _shape(name: str) -> ModelShape | None:
    try:
        return model_shape(name)
    except KimiMlxError:  # not known here, or a broken configuration, which is an error when the model is loaded
        return None


def _machines(diagnosis: Diagnosis, request: DoctorRequest) -> Sequence[Machine]:
    """Return one machine per rank; none if the memory of a host is unknown.

    Ranks that share a host get no chip, so that no speed is predicted for them.
    """
    machines: list[Machine] = []
    for host in (host.ssh for host in request.hostfile.hosts):
        facts, count = diagnosis.facts.get(host), len(request.ranks[host])
        if facts is None or facts.memory_bytes is None:
            return ()
        chip = facts.chip if count == 1 else None
        machines.append(any_machine(host, chip, facts.memory_bytes // count, facts.wired_limit_mb))
    return machines


def _link(diagnosis: Diagnosis) -> LinkProfile | None:
    """Return the link between the ranks: RDMA at its published speed, or TCP as measured."""
    if diagnosis.backend == "ring":
        return chosen_link(diagnosis)
    return RDMA if diagnosis.backend == "jaccl" else replace(RDMA, backend="ring")


def _stored_on(diagnosis: Diagnosis, request: DoctorRequest) -> str | None:
    """Return the strategy that most ranks have stores of, the newest if there is a tie; None without stores."""
    counts = Counter(
        (store.commit, store.placement)
        for host, ranks in request.ranks.items()
        for store in (diagnosis.facts[host].stores if host in diagnosis.facts else ())
        if store.repository == request.need.repository and store.rank in ranks
    )
    for (_, placement), _ in counts.most_common():
        name = read_folder_name(placement)
        if name is not None and name[1] == request.world_size:
            return name[0]
    return None
