"""Inputs of `kimi-mlx plan`: the model, the machines and their links, from the options."""

from __future__ import annotations

from dataclasses import replace

from kimi_mlx.cli.model_size import draft_shape, model_shape
from kimi_mlx.cli.plan import HardwareOptions
from kimi_mlx.cli.plan_hosts import diagnose_hosts, host_machines, measured_links
from kimi_mlx.cluster.hosts.machine import local_machine
from kimi_mlx.errors import UsageError
from kimi_mlx.planner.drafts import DraftShape
from kimi_mlx.planner.links import RDMA, TCP, WIFI, LinkProfile
from kimi_mlx.planner.machines import MACHINES_HINT, Machine, SsdRate, machine_of_host, parse_machines
from kimi_mlx.planner.model_shape import ModelShape, with_expert_bits, with_preset
from kimi_mlx.sizing.ssd import THIS_HOST, saved_speeds
from kimi_mlx.units import GB
from kimi_mlx.weights.presets import ALL_BITS, PRESETS

THIS_MAC = "this Mac"
"""Name of this machine in a plan."""


def planned_shape(
    name: str, context: int | None = None, expert_bits: int | None = None, preset: str | None = None
) -> ModelShape:
    """Return a model's dimensions and sizes as the options say.

    Args:
        name: name of the model.
        context: requested context length; None for any.
        expert_bits: bits of the routed experts; None for the model's own.
        preset: name of a preset of `convert`; None for the model's own bits.

    Raises:
        UsageError: the model is not known, has a shorter context, or the options exclude each other.
    """
    shape = model_shape(name)
    if context is not None and context > shape.context_tokens:
        raise UsageError(
            f"--context is {context}, but the context of `{name}` is {shape.context_tokens} tokens",
            hint=f"use `--context {shape.context_tokens}` or less",
        )
    if expert_bits is not None and expert_bits not in ALL_BITS:
        raise UsageError(
            f"--expert-bits is {expert_bits}, which `kimi-mlx convert` cannot make",
            hint=f"use {', '.join(map(str, ALL_BITS[:-1]))} or {ALL_BITS[-1]}",
        )
    if preset is None:
        return shape if expert_bits is None else with_expert_bits(shape, expert_bits)
    if expert_bits is not None:
        raise UsageError("--preset and --expert-bits exclude each other", hint="leave one of them out")
    return with_preset(shape, PRESETS[preset])


def planned_draft(draft: str, model: str, shape: ModelShape) -> DraftShape:
    """Return a draft model's dimensions and acceptance.

    Args:
        draft: value of `--draft`.
        model: name of the model.
        shape: the model.

    Raises:
        UsageError: there is no such draft model, or its dimensions are not known.
        ConfigError: it is made for another model.
    """
    known = draft_shape(draft, model)
    known.config.captured_layers(shape.config)
    return known


def machines_and_links(
    options: HardwareOptions, model: str, *, is_quiet: bool
) -> tuple[tuple[Machine, ...], list[LinkProfile]]:
    """Return the machines and the links to compare between them.

    Args:
        options: machines and links that the user named.
        model: name of the model, for the checks of real hosts.
        is_quiet: whether to show no status.

    Raises:
        UsageError: a machine is not known, or options exclude each other.
        SshError: a host did not answer.
        LinkError: no network between the hosts could be measured.
    """
    link, hostfile = options.link, options.hostfile
    if link == "measured" and hostfile is None:
        raise UsageError("--link measured needs hosts", hint="name them: `--hostfile two.json`")
    diagnosis = diagnose_hosts(hostfile, model, is_quiet) if hostfile is not None else None
    if options.machines:
        machines = parse_machines(",".join(options.machines))
    else:
        machines = host_machines(diagnosis) if diagnosis is not None else (this_machine(),)
    machines = tuple(_with_ssd(machine, options.ssd, is_named=bool(options.machines)) for machine in machines)
    if link == "measured" and diagnosis is not None:
        return machines, measured_links(diagnosis) if len(machines) > 1 else []
    if link is None:
        link = "rdma" if all(machine.chip.has_rdma for machine in machines) else "tcp"
    return machines, {"rdma": [RDMA, TCP], "wifi": [WIFI]}.get(link, [TCP])


def _with_ssd(machine: Machine, rate_gb_per_s: float | None, *, is_named: bool) -> Machine:
    """Return a machine with the rate of its SSD that the user gives, else with the one that the doctor has measured.

    Args:
        machine: the machine.
        rate_gb_per_s: value of `--ssd`; None without it.
        is_named: whether the machine is from --machines: a kind of Mac, on which nothing was measured.
    """
    if rate_gb_per_s is not None:
        return replace(machine, known_ssd=SsdRate(rate_gb_per_s * GB, "given"))
    speed = None if is_named else saved_speeds().get(THIS_HOST if machine.name == THIS_MAC else machine.name)
    return machine if speed is None else replace(machine, known_ssd=SsdRate(speed.best_bytes_per_s, "measured"))


def this_machine() -> Machine:
    """Return this Mac.

    Raises:
        UsageError: this machine is not a Mac, or an unknown one.
    """
    here = local_machine()
    if not here.is_mac:
        raise UsageError("this machine is not a Mac, so nothing can be predicted for it", hint=MACHINES_HINT)
    machine = machine_of_host(THIS_MAC, here.chip, here.memory_bytes, None)
    return Machine(machine.name, machine.chip, here.memory_bytes, here.gpu_bytes)
