"""`kimi-mlx plan`: memory and predicted speed of a model on Macs that you have or consider buying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kimi_mlx.cli.host_options import HostfileOption
from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import (
    CLUSTER,
    COST,
    MODEL,
    DraftOption,
    ExpertMemoryOption,
    FastSyncOption,
    JsonOption,
    ModelArgument,
    model_name,
)
from kimi_mlx.planner.links import LinkName
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS

if TYPE_CHECKING:
    from kimi_mlx.planner.cost import CostAssumptions


@dataclass(frozen=True)
class HardwareOptions:
    """Options of the machines and the link between them."""

    machines: Annotated[
        list[str] | None,
        typer.Option(
            "--machines",
            metavar="CHIP-GB[xN],...",
            help="Macs to plan for, e.g. `m3-ultra-512x2` or `m3-ultra-512,m4-max-128`; repeatable. `:460GB/s` names "
            "a slower variant or an unknown chip. Default: this Mac.",
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
    ssd: Annotated[
        float | None,
        typer.Option(
            "--ssd",
            min=0.1,
            max=1000,
            metavar="GB/s",
            help="Rate at which each Mac reads experts from its SSD. Default: as `kimi-mlx doctor` measured it, else "
            "as published.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None


@dataclass(frozen=True)
class CostOptions:
    """Options of the cost of a million tokens."""

    cost: Annotated[
        bool, typer.Option("--cost", help="Also show the cost of a million tokens.", rich_help_panel=COST)
    ] = False
    tokens_a_day: Annotated[
        float,
        typer.Option(
            "--tokens-a-day", min=1, max=1e12, help="With --cost: tokens generated per day.", rich_help_panel=COST
        ),
    ] = 200_000
    electricity: Annotated[
        float, typer.Option("--electricity", min=0, max=1e6, help="With --cost: price per kWh.", rich_help_panel=COST)
    ] = 0.30
    years: Annotated[
        float, typer.Option("--years", min=0.1, max=1000, help="With --cost: years of use.", rich_help_panel=COST)
    ] = 4
    price: Annotated[
        float | None,
        typer.Option(
            "--price",
            min=0,
            max=1e12,
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
            max=1e9,
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
            max=1e9,
            help="With --cost: monthly price of a subscription to compare with.",
            show_default=False,
            rich_help_panel=COST,
        ),
    ] = None

    def assumptions(self) -> CostAssumptions:
        """Return the options as the planner's assumptions."""
        from kimi_mlx.planner.cost import CostAssumptions

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
            help="Plan for what `convert --expert-bits` makes: experts of this many bits, the rest of 8.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    preset: Annotated[
        Literal["2bit", "2.5bit", "3bit", "4bit"] | None,
        typer.Option(
            "--preset",
            help="Plan for what `convert --preset` makes.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    draft: DraftOption = None,
    expert_memory: ExpertMemoryOption = "auto",
    with_backtest: Annotated[
        bool, typer.Option("--backtest", help="Compare predictions with published results instead.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Predict memory and speed on one or more Macs.

    It recommends how to split the model; nothing is loaded.
    """
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.cli.output import hides_messages, print_json
    from kimi_mlx.cli.plan_inputs import machines_and_links, planned_draft, planned_shape
    from kimi_mlx.cli.plan_report import (
        backtest_report,
        better_without_draft,
        cost_lines,
        number_that_fits,
        plan_report,
        print_parts,
    )
    from kimi_mlx.planner.backtest import backtest
    from kimi_mlx.planner.cost import cost_of_plan
    from kimi_mlx.planner.search import make_plan
    from kimi_mlx.planner.to_json import backtest_to_dict, plan_to_dict
    from kimi_mlx.sizing.expert_memory import ExpertMemory

    if with_backtest:
        comparisons = backtest()
        print_json(backtest_to_dict(comparisons)) if json else print_parts(backtest_report(comparisons))
        return
    name = model_name(model)
    shape = planned_shape(name, context, expert_bits, preset)
    machines, links = machines_and_links(hardware, name, is_quiet=hides_messages(json))
    context = context or min(CONTEXT_TOKENS, shape.context_tokens)
    with_draft = None if draft is None else planned_draft(draft, name, shape)
    result = make_plan(
        shape,
        machines,
        links,
        context,
        is_fast_sync=hardware.fast_sync,
        draft=with_draft,
        expert_memory=ExpertMemory.parse(expert_memory),
    )
    assumptions = costs.assumptions()
    cost = cost_of_plan(result, assumptions) if costs.cost else None
    if json:
        print_json(plan_to_dict(result, cost))
    else:
        if result.choice is None:
            print_parts([number_that_fits(result, links), ""])
        if (better := better_without_draft(result, links)) is not None:
            print_parts([better, ""])
        print_parts(plan_report(result))
        if cost is not None:
            print_parts(cost_lines(cost, assumptions))
    if result.choice is None:
        raise typer.Exit(1)
