"""`kimi-mlx plan`: memory and predicted speed of a model on Macs that you have or consider buying."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Annotated

import typer

from kimi_mlx.cli.host_options import HostfileOption
from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import CLUSTER, COST, MODEL, FastSyncOption, JsonOption, ModelArgument, model_name
from kimi_mlx.cli.output import print_json, stdout
from kimi_mlx.cli.plan_hosts import diagnose_hosts, host_machines, measured_links
from kimi_mlx.cli.plan_report import Part, backtest_report, cost_lines, plan_report
from kimi_mlx.cluster.hosts.machine import local_machine
from kimi_mlx.errors import UsageError
from kimi_mlx.planner.backtest import backtest
from kimi_mlx.planner.cost import Cost, CostAssumptions, make_cost
from kimi_mlx.planner.links import RDMA, TCP, WIFI, LinkName, LinkProfile
from kimi_mlx.planner.machines import MAX_MACHINES, Machine, machine_of_host, parse_machines
from kimi_mlx.planner.model_shape import ModelShape, known_models, known_shape, shape_of_folder, with_expert_bits
from kimi_mlx.planner.search import Plan, make_plan
from kimi_mlx.planner.to_json import backtest_to_dict, plan_to_dict
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS
from kimi_mlx.store.locate import config_folder
from kimi_mlx.store.model_ref import resolve_model_name
from kimi_mlx.units import GIB


@dataclass(frozen=True)
class HardwareOptions:
    """Options of the machines and the link between them."""

    machines: Annotated[
        str | None,
        typer.Option(
            "--machines",
            metavar="CHIP-GB[xN],...",
            help="Macs to plan for, e.g. `m3-ultra-512x2` or `m3-ultra-512,m4-max-128`. Default: this Mac.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None
    hostfile: HostfileOption = None
    link: Annotated[
        LinkName | None,
        typer.Option(
            "--link",
            help="Network between the Macs; `measured` measures that of --hostfile. Default: `rdma` if all chips have "
            "it, else `tcp`, both over Thunderbolt.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None
    fast_sync: FastSyncOption = False


@dataclass(frozen=True)
class CostOptions:
    """Options of the cost of a million tokens."""

    cost: Annotated[
        bool, typer.Option("--cost", help="Also show the cost of a million tokens.", rich_help_panel=COST)
    ] = False
    tokens_a_day: Annotated[
        float,
        typer.Option("--tokens-a-day", min=1, help="With --cost: tokens generated per day.", rich_help_panel=COST),
    ] = 200_000
    electricity: Annotated[
        float, typer.Option("--electricity", min=0, help="With --cost: price per kWh.", rich_help_panel=COST)
    ] = 0.30
    years: Annotated[
        float, typer.Option("--years", min=0.1, help="With --cost: years of use.", rich_help_panel=COST)
    ] = 4
    price: Annotated[
        float | None,
        typer.Option(
            "--price",
            min=0,
            help="With --cost: price of all machines. Default: from a table.",
            show_default=False,
            rich_help_panel=COST,
        ),
    ] = None
    watts: Annotated[
        float | None,
        typer.Option(
            "--watts",
            min=0,
            help="With --cost: power of all machines under load. Default: from a table.",
            show_default=False,
            rich_help_panel=COST,
        ),
    ] = None
    subscription: Annotated[
        float | None,
        typer.Option(
            "--subscription",
            min=0,
            help="With --cost: monthly price of a subscription to compare with.",
            show_default=False,
            rich_help_panel=COST,
        ),
    ] = None

    def assumptions(self) -> CostAssumptions:
        """Return the options as the planner's assumptions."""
        return CostAssumptions(
            self.tokens_a_day, self.electricity, self.years, self.price, self.watts, self.subscription
        )


@with_option_groups
def plan(
    hardware: HardwareOptions,
    costs: CostOptions,
    model: ModelArgument = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            help="Context length in tokens; decode speed is predicted at its end. "
            f"Default: {CONTEXT_TOKENS}, or the model's if that is shorter.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    expert_bits: Annotated[
        int | None,
        typer.Option(
            "--expert-bits",
            min=2,
            max=8,
            help="Plan as if the experts had this many bits.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    with_backtest: Annotated[
        bool, typer.Option("--backtest", help="Compare predictions with published results instead.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Predict memory and speed on one or more Macs.

    It recommends how to split the model; nothing is loaded.
    """
    if with_backtest:
        comparisons = backtest()
        print_json(backtest_to_dict(comparisons)) if json else _print(*backtest_report(comparisons))
        return
    name = model_name(model)
    shape = _shape(name, context, expert_bits)
    machines, links = _machines_and_links(hardware, name, is_quiet=json)
    context = context or min(CONTEXT_TOKENS, shape.context_tokens)
    result = make_plan(shape, machines, links, context, is_fast_sync=hardware.fast_sync)
    assumptions = costs.assumptions()
    cost = _cost(result, assumptions) if costs.cost else None
    if json:
        print_json(plan_to_dict(result, cost))
        return
    if result.choice is None:
        _print(_number_that_fits(result, links), "")
    _print(*plan_report(result))
    if cost is not None:
        _print(*cost_lines(cost, assumptions))


def _shape(name: str, context: int | None, expert_bits: int | None) -> ModelShape:
    """Return a model's dimensions and sizes as the options say.

    Raises:
        UsageError: the model is not known, or has a shorter context.
    """
    shape = shape_of(name)
    if context is not None and context > shape.context_tokens:
        raise UsageError(
            f"--context is {context}, but the context of `{name}` is {shape.context_tokens} tokens",
            hint=f"use `--context {shape.context_tokens}` or less",
        )
    return shape if expert_bits is None else with_expert_bits(shape, expert_bits)


def shape_of(name: str) -> ModelShape:
    """Return a model's dimensions and sizes: of the checkpoint on this machine, else those of a known model.

    Raises:
        UsageError: there is no such model, or its dimensions are not known here.
    """
    target = resolve_model_name(name)
    folder = config_folder(target)
    if folder is not None:
        return shape_of_folder(name, folder)
    alias = target.entry.alias if target.entry is not None else None
    if alias in known_models():
        return known_shape(alias)
    raise UsageError(
        f"the dimensions of `{name}` are not known here",
        hint=f"give a folder with its `config.json`, or one of {', '.join(known_models())}",
    )


def _machines_and_links(
    options: HardwareOptions, model: str, *, is_quiet: bool
) -> tuple[tuple[Machine, ...], list[LinkProfile]]:
    """Return the machines and the links to compare between them.

    Raises:
        UsageError: a machine is not known, or options do not go together.
        SshError: a host did not answer.
        LinkError: no network between the hosts could be measured.
    """
    link, hostfile = options.link, options.hostfile
    if link == "measured" and hostfile is None:
        raise UsageError("--link measured needs hosts", hint="name them: `--hostfile two.json`")
    diagnosis = diagnose_hosts(hostfile, model, is_quiet) if hostfile is not None else None
    if options.machines is not None:
        machines = parse_machines(options.machines)
    else:
        machines = host_machines(diagnosis) if diagnosis is not None else (_this_mac(),)
    if link == "measured" and diagnosis is not None:
        return machines, measured_links(diagnosis) if len(machines) > 1 else []
    if link is None:
        link = "rdma" if all(machine.chip.has_rdma for machine in machines) else "tcp"
    return machines, {"rdma": [RDMA, TCP], "wifi": [WIFI]}.get(link, [TCP])


def _this_mac() -> Machine:
    here = local_machine()
    machine = machine_of_host("this Mac", here.chip, here.memory_bytes, None)
    return Machine(machine.name, machine.chip, here.memory_bytes, here.gpu_bytes)


def _cost(result: Plan, assumptions: CostAssumptions) -> Cost | None:
    """Return the cost of the chosen option; None if the model does not fit."""
    if result.choice is None:
        return None
    used = [machine for machine in result.machines if machine.name in result.choice.hosts]
    return make_cost(used, result.choice.decode_tok_per_s, assumptions)


def _number_that_fits(result: Plan, links: list[LinkProfile]) -> str:
    """Return a sentence that says how many machines like the largest one would be enough."""
    largest = max(result.machines, key=lambda machine: machine.memory_bytes)
    name = f"{largest.chip.chip}-{round(largest.memory_bytes / GIB)}"
    for number in range(2, MAX_MACHINES + 1):
        machines = [
            Machine(f"{largest.chip.chip} #{index + 1}", largest.chip, largest.memory_bytes, largest.gpu_bytes)
            for index in range(number)
        ]
        if make_plan(result.shape, machines, links or [TCP], result.context).choice is not None:
            return f"Does not fit. {number} x {name} would be enough."
    return f"Does not fit. Even {MAX_MACHINES} x {name} would not be enough."


def _print(*parts: Part) -> None:
    for part in parts:
        if isinstance(part, str):
            indent = " " * (len(part) - len(part.lstrip()) + 2) if part.startswith(" ") else ""
            part = textwrap.fill(part, stdout.width, subsequent_indent=indent, break_long_words=False)
        stdout.print(part, markup=False, soft_wrap=isinstance(part, str))
