"""`kimi-mlx bench`: prefill and decode speed, waiting times, memory; alone or against mlx-lm."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kimi_mlx.cli.bench_output import Output
from kimi_mlx.cli.fetch_model import fetch_model
from kimi_mlx.cli.open_model import launch_context, open_on_hosts
from kimi_mlx.cli.options import (
    CheckEveryOption,
    DtypeOption,
    FastSyncOption,
    JsonOption,
    ModelArgument,
    RanksOption,
    SpeculateOption,
    StrategyOption,
    refuse_mlx_launch,
)
from kimi_mlx.cli.output import load_progress, stderr
from kimi_mlx.cli.placement import choose_placement, print_placement
from kimi_mlx.errors import KimiMlxError, UsageError
from kimi_mlx.planner.links import LinkProfile, measured_link
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.settings import Settings
from kimi_mlx.store.locate import Target, understand
from kimi_mlx.units import format_rate

if TYPE_CHECKING:
    from kimi_mlx.bench.measure import BenchmarkPlan, EnergyOf, Run
    from kimi_mlx.bench.sides import Side
    from kimi_mlx.cluster.hosts.host import Cluster
    from kimi_mlx.model.config import ModelConfig

MAX_LINK_DELAY_MS = 1000

LOOPBACK_BYTES_PER_S = 1e9
"""About what the relay carries."""


def bench(
    context: typer.Context,
    model: ModelArgument = None,
    synthetic: Annotated[
        Literal["wide", "deep"] | None,
        typer.Option(
            "--synthetic",
            help="Instead of MODEL a checkpoint of K2's shape with random weights, made once: "
            "`wide` has 8 wide layers, `deep` 61 small ones.",
        ),
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", metavar="N,N,...", help="Sizes of the prompts (random tokens).")
    ] = "128,512",
    generation_tokens: Annotated[
        int, typer.Option("--generation-tokens", min=2, help="New tokens after each prompt.")
    ] = 64,
    depth: Annotated[
        str,
        typer.Option("--depth", metavar="N,N,...", help="Tokens that are in the cache before the timed prompt."),
    ] = "0",
    concurrency: Annotated[
        str, typer.Option("--concurrency", metavar="N,N,...", help="Requests at the same time.")
    ] = "1",
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Repetitions that do not count.")] = 1,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Repetitions that count.")] = 5,
    ranks: RanksOption = 1,
    strategy: StrategyOption = None,
    speculate: SpeculateOption = 0,
    check_every: CheckEveryOption = 0,
    link_delay_ms: Annotated[
        float | None,
        typer.Option(
            "--link-delay-ms",
            metavar="MS",
            help="With --ranks: what one rank says reaches the next so much later, each way.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = None,
    fast_sync: FastSyncOption = False,
    against: Annotated[
        Literal["mlx-lm"] | None,
        typer.Option("--against", help="Run mlx-lm on the same checkpoint in turns, and print the ratios."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the prompts.")] = 0,
    json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write JSON with every run.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw a PNG (needs matplotlib).", show_default=False)
    ] = None,
) -> None:
    """Measure a model: prefill and decode tok/s, time to the first token and between tokens, peak memory."""
    refuse_mlx_launch()
    form = Output(json, markdown, output, plot)
    form.check()
    launched = launch_context(context)
    _check_delay(link_delay_ms, ranks if launched is None else 1)
    from kimi_mlx.bench import machine
    from kimi_mlx.bench.measure import BenchmarkPlan
    from kimi_mlx.bench.report import Report
    from kimi_mlx.bench.roofline import Roofline
    from kimi_mlx.bench.sides import SessionSide
    from kimi_mlx.model.config import load_config

    plan = BenchmarkPlan(
        _numbers("--prompt-tokens", prompt_tokens, "128,512"),
        generation_tokens,
        warmup,
        repeat,
        seed,
        _numbers("--depth", depth, "0,8192"),
        _numbers("--concurrency", concurrency, "1,4"),
    )
    roofline = None
    wanted = SessionOptions(None, dtype=dtype, speculate=speculate, check_every=check_every, fast_sync=fast_sync)
    with ExitStack() as stack:
        if launched is not None:
            target = understand(model or Settings.from_environment().model)
            session = stack.enter_context(closing(open_on_hosts(launched, target, wanted, json)))
            sides: list[Side] = [SessionSide("kimi-mlx", session)]
            ranks, choice = launched.cluster.size, launched.choice
            config = load_config(session.tokenizer_folder)
            plan.check_context(config.max_position_embeddings)
        else:
            target = _target(model, synthetic)
            choice = choose_placement(target, ranks, strategy, _delayed_link(link_delay_ms))
            folder = _folder(target, synthetic, ranks, choice.strategy, json)
            config = load_config(folder)
            plan.check_context(config.max_position_embeddings)
            print_placement(choice, f"{ranks} ranks", is_quiet=json or ranks == 1)
            roofline = Roofline.of(config, _dtype_name(dtype, config), generation_tokens)
            cluster = _delayed_cluster(ranks, link_delay_ms, fast_sync, stack)
            options = replace(wanted, folder=folder, ranks=ranks, strategy=choice.strategy, cluster=cluster)
            sides = _open_sides(options, against, json, stack)
        settings = {
            "model": synthetic or model or Settings.from_environment().model,
            "ranks": ranks,
            "placement": choice.to_dict(),
            "hosts": None if launched is None else launched.cluster.names,
            "link_delay_ms": link_delay_ms,
            "speculate": speculate,
            "sums": next(
                (side.all_reduce.to_dict() for side in sides if isinstance(side, SessionSide) and side.all_reduce), None
            ),
            "dtype": _dtype_name(dtype, config),
            "date": machine.now(),
            "machine": machine.machine(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "roofline": None if roofline is None else roofline.to_dict(),
        }
        energy_of = _energy(stack) if launched is None else None
        runs, stop = _collect(sides, plan, config.vocab_size, energy_of, json)
    form.show(Report(plan, settings, runs, sides, None if roofline is None else roofline.share))
    if stop is not None:
        raise stop


def _numbers(option: str, text: str, example: str) -> tuple[int, ...]:
    """Numbers from `128,512`."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(
            f"{option} is `{text}`, not whole numbers with commas between them",
            hint=f"use for example {option} {example}",
        ) from None


def _check_delay(delay_ms: float | None, ranks: int) -> None:
    if delay_ms is None:
        return
    if not 0 <= delay_ms <= MAX_LINK_DELAY_MS:
        raise UsageError(f"--link-delay-ms is {delay_ms:g}, not from 0 to {MAX_LINK_DELAY_MS}")
    if ranks == 1:
        raise UsageError("--link-delay-ms is for several ranks on this machine", hint="add for example `--ranks 2`")


def _target(model: str | None, synthetic: str | None) -> Target | None:
    """The model to measure; None for a synthetic one."""
    if synthetic is None:
        return understand(model or Settings.from_environment().model)
    if model is not None:
        raise UsageError(f"`{model}` and --synthetic exclude each other", hint="leave one of them out")
    return None


def _folder(target: Target | None, synthetic: str | None, ranks: int, strategy: str, is_quiet: bool) -> Path:
    """The checkpoint to measure."""
    if target is not None:
        return fetch_model(target, ranks, strategy, is_quiet)
    assert synthetic is not None
    from kimi_mlx.bench.workloads import synthetic_checkpoint

    with load_progress(f"making the checkpoint `{synthetic}`", is_quiet) as progress:
        return synthetic_checkpoint(synthetic, progress)


def _dtype_name(dtype: str | None, config: ModelConfig) -> str:
    """The type that both sides compute in."""
    from kimi_mlx.runtime.load import compute_dtype

    return str(compute_dtype(dtype, config)).removeprefix("mlx.core.")


def _delayed_cluster(ranks: int, delay_ms: float | None, fast_sync: bool, stack: ExitStack) -> Cluster | None:
    """Ranks here with a long cable between them; None without a delay."""
    if delay_ms is None:
        return None
    from kimi_mlx.bench.slow_link import slow_links
    from kimi_mlx.cluster.hosts.host import local_cluster

    return replace(local_cluster(ranks, fast_sync), detour=stack.enter_context(slow_links(delay_ms)))


def _delayed_link(delay_ms: float | None) -> LinkProfile | None:
    """The same as the planner sees it."""
    return None if not delay_ms else measured_link(2 * delay_ms / 1000, LOOPBACK_BYTES_PER_S)


def _energy(stack: ExitStack) -> EnergyOf | None:
    """What this machine uses, where it tells."""
    from kimi_mlx.bench.power import can_measure_power, power_log

    return stack.enter_context(power_log()).energy_j if can_measure_power() else None


def _open_sides(options: SessionOptions, against: str | None, is_quiet: bool, stack: ExitStack) -> list[Side]:
    """Load kimi-mlx and, if asked, mlx-lm in each way that it can run the model."""
    from kimi_mlx.bench.sides import open_kimi_mlx

    with load_progress("loading kimi-mlx", is_quiet) as progress:
        sides: list[Side] = [stack.enter_context(open_kimi_mlx(options, progress))]
    if against is not None:
        sides += _open_mlx_lm_sides(options, stack)
    return sides


def _open_mlx_lm_sides(options: SessionOptions, stack: ExitStack) -> list[Side]:
    """mlx-lm's sides; a mode that cannot run this model is left out with a word, none at all is an error."""
    from kimi_mlx.bench.mlx_lm_side import MODES, open_mlx_lm

    sides: list[Side] = []
    failure: KimiMlxError | None = None
    for mode in MODES[options.ranks > 1]:
        try:
            with stderr.status(f"loading mlx-lm ({mode})"):
                sides.append(stack.enter_context(open_mlx_lm(options, mode)))
        except KimiMlxError as error:
            failure = error
            stderr.print(f"left out: {error.message}", style="yellow", markup=False)
    if not sides and failure is not None:
        raise failure
    return sides


def _collect(
    sides: Sequence[Side], plan: BenchmarkPlan, vocab_size: int, energy_of: EnergyOf | None, is_quiet: bool
) -> tuple[list[Run], BaseException | None]:
    """What was measured, and what stopped it before the end: worth showing once anything has counted."""
    from kimi_mlx.bench.measure import measure

    runs: list[Run] = []
    try:
        with _run_progress(sides, plan, is_quiet) as advance:
            for run in measure(sides, plan, vocab_size, energy_of):
                runs.append(run)
                advance(run)
    except (KeyboardInterrupt, KimiMlxError) as stop:
        if all(run.is_warmup for run in runs):
            raise
        return runs, stop
    return runs, None


@contextmanager
def _run_progress(sides: Sequence[Side], plan: BenchmarkPlan, is_quiet: bool) -> Generator[Callable[[Run], None]]:
    """A bar of batches done, on stderr of a terminal; yields what to call after each."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
        disable=is_quiet or not stderr.is_terminal,
    )
    with progress:
        task = progress.add_task("measuring", total=plan.total * len(sides))

        def advance(run: Run) -> None:
            speed = format_rate(run.new_tokens / run.outcome.wall_s)
            progress.update(task, advance=1, description=f"{run.case}, {run.side}: {speed}")

        yield advance
