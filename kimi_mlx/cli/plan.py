"""`kimi-mlx plan`: memory and predicted speed of a model on Macs that one has, or thinks of buying."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer

from kimi_mlx.cli.host_options import HostfileOption
from kimi_mlx.cli.options import FastSyncOption, JsonOption, ModelArgument
from kimi_mlx.cli.output import print_json, stdout
from kimi_mlx.cli.plan_hosts import diagnose_hosts, host_machines, measured_links
from kimi_mlx.cli.plan_report import Part, backtest_report, cost_lines, plan_report
from kimi_mlx.cluster.hosts.machine import this_machine
from kimi_mlx.errors import UsageError
from kimi_mlx.planner.backtest import backtest
from kimi_mlx.planner.cost import Cost, CostAssumptions, make_cost
from kimi_mlx.planner.links import RDMA, TCP, WIFI, LinkName, LinkProfile
from kimi_mlx.planner.machines import MAX_MACHINES, Machine, machine_of_host, parse_machines
from kimi_mlx.planner.model_shape import ModelShape, known_models, known_shape, shape_of_folder, with_expert_bits
from kimi_mlx.planner.search import Plan, make_plan
from kimi_mlx.planner.to_json import backtest_to_dict, plan_to_dict
from kimi_mlx.settings import Settings
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS
from kimi_mlx.store.locate import config_folder, resolve_model_name


def plan(
    model: ModelArgument = None,
    machines: Annotated[
        str | None,
        typer.Option(
            "--machines",
            metavar="CHIP-GB[xN],...",
            help="Such as `m3-ultra-512x2` or `m3-ultra-512,m4-max-128`. Default: this Mac.",
            show_default=False,
        ),
    ] = None,
    hostfile: HostfileOption = None,
    link: Annotated[
        LinkName | None,
        typer.Option(
            "--link",
            help="Between them; `measured` asks the hosts of --hostfile. Default: `rdma` where the chips have it, "
            "else `tcp`, over Thunderbolt.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            help=f"Tokens to have room for; decode is predicted at their end. Default: {CONTEXT_TOKENS}.",
            show_default=False,
        ),
    ] = None,
    expert_bits: Annotated[
        int | None,
        typer.Option("--expert-bits", min=2, max=8, help="As if the experts had so many bits.", show_default=False),
    ] = None,
    fast_sync: FastSyncOption = False,
    with_backtest: Annotated[
        bool, typer.Option("--backtest", help="Show predictions against published figures instead.")
    ] = False,
    cost: Annotated[bool, typer.Option("--cost", help="Also what a million tokens cost.")] = False,
    tokens_a_day: Annotated[
        float, typer.Option("--tokens-a-day", min=1, help="With --cost: tokens generated per day.")
    ] = 200_000,
    electricity: Annotated[float, typer.Option("--electricity", min=0, help="With --cost: price per kWh.")] = 0.30,
    years: Annotated[float, typer.Option("--years", min=0.1, help="With --cost: years of use.")] = 4,
    price: Annotated[
        float | None,
        typer.Option("--price", min=0, help="--cost: of all machines. Default: the table's.", show_default=False),
    ] = None,
    watts: Annotated[
        float | None,
        typer.Option(
            "--watts", min=0, help="--cost: of all machines at work. Default: the table's.", show_default=False
        ),
    ] = None,
    subscription: Annotated[
        float | None,
        typer.Option("--subscription", min=0, help="--cost: price a month to compare with.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Predict memory and speed on one or more Macs.

    It recommends how to split the model; nothing is loaded.
    """
    if with_backtest:
        comparisons = backtest()
        print_json(backtest_to_dict(comparisons)) if json else _print(*backtest_report(comparisons))
        return
    name = model or Settings.from_environment().model
    shape = shape_of(name)
    if expert_bits is not None:
        shape = with_expert_bits(shape, expert_bits)
    context = context or min(CONTEXT_TOKENS, shape.context_tokens)
    if context > shape.context_tokens:
        raise UsageError(
            f"--context is {context}, but `{name}` ends at {shape.context_tokens} tokens", hint="ask for fewer"
        )
    hosts, links = _where(machines, hostfile, link, name, is_quiet=json)
    found = make_plan(shape, hosts, links, context, is_fast_sync=fast_sync)
    assumptions = CostAssumptions(tokens_a_day, electricity, years, price, watts, subscription)
    costs = _cost(found, assumptions) if cost else None
    if json:
        print_json(plan_to_dict(found, costs))
        return
    _print(*plan_report(found))
    if costs is not None:
        _print(*cost_lines(costs, assumptions))
    if found.choice is None:
        _print(*_would_fit(found, links))


def shape_of(name: str) -> ModelShape:
    """A model's dimensions and sizes: of the checkpoint here, else what is known of it.

    Raises:
        UsageError: no such model, or nothing is known of it here.
    """
    target = resolve_model_name(name)
    folder = config_folder(target)
    if folder is not None:
        return shape_of_folder(name, folder)
    alias = target.entry.alias if target.entry is not None else None
    if alias in known_models():
        return known_shape(alias)
    raise UsageError(
        f"nothing is known here of the dimensions of `{name}`",
        hint=f"give a folder with its `config.json`, or one of {', '.join(known_models())}",
    )


def _where(
    machines: str | None, hostfile: Path | None, link: LinkName | None, model: str, *, is_quiet: bool
) -> tuple[tuple[Machine, ...], list[LinkProfile]]:
    """The machines and the links between them."""
    if link == "measured" and hostfile is None:
        raise UsageError("--link measured needs hosts", hint="name them: `--hostfile two.json`")
    diagnosis = diagnose_hosts(hostfile, model, is_quiet) if hostfile is not None else None
    if machines is not None:
        hosts = parse_machines(machines)
    else:
        hosts = host_machines(diagnosis) if diagnosis is not None else (_this_machine(),)
    if link == "measured" and diagnosis is not None:
        return hosts, measured_links(diagnosis) if len(hosts) > 1 else []
    if link is None:
        link = "rdma" if all(machine.chip.has_rdma for machine in hosts) else "tcp"
    return hosts, {"rdma": [RDMA, TCP], "wifi": [WIFI]}.get(link, [TCP])


def _this_machine() -> Machine:
    here = this_machine()
    machine = machine_of_host("this Mac", here.chip, here.memory_bytes, None)
    return Machine(machine.name, machine.chip, here.memory_bytes, here.gpu_bytes)


def _cost(found: Plan, assumptions: CostAssumptions) -> Cost | None:
    if found.choice is None:
        return None
    used = [machine for machine in found.machines if machine.name in found.choice.hosts]
    return make_cost(used, found.choice.decode_tok_per_s, assumptions)


def _would_fit(found: Plan, links: list[LinkProfile]) -> list[str]:
    """How many of the largest machine would do."""
    largest = max(found.machines, key=lambda machine: machine.memory_bytes)
    for count in range(2, MAX_MACHINES + 1):
        hosts = [
            Machine(f"{largest.chip.chip} #{index + 1}", largest.chip, largest.memory_bytes, largest.gpu_bytes)
            for index in range(count)
        ]
        if make_plan(found.shape, hosts, links or [TCP], found.context).choice is not None:
            return [f"It would fit on {count} like the largest of these."]
    return [f"It would not fit on {MAX_MACHINES} like the largest of these either."]


def _print(*parts: Part) -> None:
    for part in parts:
        if isinstance(part, str):
            indent = " " * (len(part) - len(part.lstrip()) + 2) if part.startswith(" ") else ""
            part = textwrap.fill(part, stdout.width, subsequent_indent=indent, break_long_words=False)
        stdout.print(part, markup=False, soft_wrap=isinstance(part, str))
