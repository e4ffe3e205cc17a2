"""`kimi-mlx bench`: prefill and decode speed, waiting times, memory; alone or against mlx-lm."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kimi_mlx.cli.bench_output import Output
from kimi_mlx.cli.fetch_model import fetch_model
from kimi_mlx.cli.open_model import (
    LaunchContext,
    launch_context,
    open_session,
    prepare_model,
    session_options,
)
from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import MEASUREMENT, OUTPUT, JsonOption, RunOptions, refuse_mlx_launch
from kimi_mlx.cli.output import load_progress, stderr
from kimi_mlx.cli.placement import choose_placement, print_placement
from kimi_mlx.errors import KimiMlxError, UsageError
from kimi_mlx.model.config import load_config
from kimi_mlx.planner.choice import Choice
from kimi_mlx.planner.links import LinkProfile, measured_link
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.store.model_ref import ModelRef, resolve_model_name
from kimi_mlx.units import format_rate

if TYPE_CHECKING:
    from kimi_mlx.bench.measure import BenchmarkPlan, EnergyOf, Run
    from kimi_mlx.bench.roofline import Roofline
    from kimi_mlx.bench.sides import Side
    from kimi_mlx.cluster.hosts.host import Cluster
    from kimi_mlx.model.config import ModelConfig

MAX_LINK_DELAY_MS = 1000

LOOPBACK_BYTES_PER_S = 1e9
"""About what the relay carries."""


@dataclass(frozen=True)
class MeasurementOptions:
    """Options of the measurement."""

    synthetic: Annotated[
        Literal["wide", "deep"] | None,
        typer.Option(
            "--synthetic",
            help="Measure a checkpoint of K2's shape with random weights instead of MODEL: `wide` has 8 wide layers, "
            "`deep` 61 small ones.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None
    prompt_tokens: Annotated[
        str,
        typer.Option(
            "--prompt-tokens", metavar="N,N,...", help="Prompt lengths (random tokens).", rich_help_panel=MEASUREMENT
        ),
    ] = "128,512"
    generation_tokens: Annotated[
        int,
        typer.Option("--generation-tokens", min=2, help="New tokens per prompt.", rich_help_panel=MEASUREMENT),
    ] = 64
    depth: Annotated[
        str,
        typer.Option(
            "--depth",
            metavar="N,N,...",
            help="Tokens in the cache before the timed prompt.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = "0"
    concurrency: Annotated[
        str,
        typer.Option(
            "--concurrency",
            metavar="N,N,...",
            help="Number of simultaneous requests.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = "1"
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, help="Number of warm-up runs.", rich_help_panel=MEASUREMENT)
    ] = 1
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Number of measured runs.", rich_help_panel=MEASUREMENT)
    ] = 5
    link_delay_ms: Annotated[
        float | None,
        typer.Option(
            "--link-delay-ms",
            metavar="MS",
            help="With --ranks: add this one-way latency (ms) between local ranks.",
            show_default=False,
            rich_help_panel=MEASUREMENT,
        ),
    ] = None
    against: Annotated[
        Literal["mlx-lm"] | None,
        typer.Option(
            "--against",
            help="Also run mlx-lm on the same checkpoint, alternating, and print the ratios.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Random seed of the prompts.", rich_help_panel=MEASUREMENT)
    ] = 0

    def plan(self) -> BenchmarkPlan:
        """Return the cases to run.

        Raises:
            UsageError: a list that is not of whole numbers, or a value out of range.
        """
        from kimi_mlx.bench.measure import BenchmarkPlan

        return BenchmarkPlan(
            _numbers("--prompt-tokens", self.prompt_tokens, "128,512"),
            self.generation_tokens,
            self.warmup,
            self.repeat,
            self.seed,
            _numbers("--depth", self.depth, "0,8192"),
            _numbers("--concurrency", self.concurrency, "1,4"),
        )


@dataclass(frozen=True)
class ReportOptions:
    """Options of where the results go."""

    json: JsonOption = False
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.", rich_help_panel=OUTPUT)] = False
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Write JSON with every run.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw a PNG (needs matplotlib).",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None


@with_option_groups
def bench(context: typer.Context, run: RunOptions, measurement: MeasurementOptions, report: ReportOptions) -> None:
    """Measure speed, latency and memory of a model.

    It reports prefill and decode tok/s, time to first token, time between tokens, and peak memory.
    """
    refuse_mlx_launch()
    output = Output(report.json, report.markdown, report.output, report.plot)
    output.check()
    launch = launch_context(context)
    _check_delay(measurement.link_delay_ms, run.ranks if launch is None else 1)
    from kimi_mlx.bench.report import Report

    plan = measurement.plan()
    with ExitStack() as stack:
        setup = (
            _open_on_this_machine(run, measurement, plan, report.json, stack)
            if launch is None
            else _open_on_hosts(launch, run, plan, report.json, stack)
        )
        energy_of = _energy(stack) if launch is None else None
        settings = _settings(run, measurement, setup, launch)
        runs, stop = _collect(setup.sides, plan, setup.config.vocab_size, energy_of, report.json)
    roofline = setup.roofline
    output.show(Report(plan, settings, runs, setup.sides, None if roofline is None else roofline.share))
    if stop is not None:
        raise stop


@dataclass(frozen=True)
class _Setup:
    """Loaded models, and what they were loaded from."""

    sides: Sequence[Side]
    choice: Choice
    config: ModelConfig
    roofline: Roofline | None = None


def _open_on_hosts(
    launch: LaunchContext, run: RunOptions, plan: BenchmarkPlan, is_quiet: bool, stack: ExitStack
) -> _Setup:
    """Load the model on launched hosts."""
    from kimi_mlx.bench.sides import SessionSide

    prepared = prepare_model(launch, resolve_model_name(run.model_name), run, is_quiet=is_quiet)
    opened = open_session(prepared, session_options(run, has_sampling=False), run.ranks, is_quiet)
    session = stack.enter_context(closing(opened.session))
    config = load_config(opened.tokenizer_folder)
    plan.check_context(config.max_position_embeddings)
    return _Setup([SessionSide("kimi-mlx", session)], prepared.choice, config)


def _open_on_this_machine(
    run: RunOptions, measurement: MeasurementOptions, plan: BenchmarkPlan, is_quiet: bool, stack: ExitStack
) -> _Setup:
    """Load the model on this machine, and mlx-lm's if it is compared."""
    from kimi_mlx.bench.roofline import Roofline

    target = _target(run, measurement.synthetic)
    choice = choose_placement(target, run.ranks, run.strategy, _delayed_link(measurement.link_delay_ms))
    folder = _folder(target, measurement.synthetic, run.ranks, choice.strategy, is_quiet)
    config = load_config(folder)
    plan.check_context(config.max_position_embeddings)
    print_placement(choice, f"{run.ranks} ranks", is_quiet or run.ranks == 1)
    options = replace(
        session_options(run, has_sampling=False),
        folder=folder,
        ranks=run.ranks,
        strategy=choice.strategy,
        cluster=_delayed_cluster(run.ranks, measurement.link_delay_ms, run.fast_sync, stack),
    )
    roofline = Roofline.of(config, _dtype_name(run.dtype, config), measurement.generation_tokens)
    return _Setup(_open_sides(options, measurement.against, is_quiet, stack), choice, config, roofline)


def _settings(
    run: RunOptions, measurement: MeasurementOptions, setup: _Setup, launch: LaunchContext | None
) -> dict[str, Any]:
    """Return the settings of the run, for the report."""
    from kimi_mlx.bench import machine
    from kimi_mlx.bench.sides import SessionSide

    all_reduce = (side.all_reduce for side in setup.sides if isinstance(side, SessionSide))
    return {
        "model": measurement.synthetic or run.model_name,
        "ranks": run.ranks if launch is None else launch.cluster.size,
        "placement": setup.choice.to_dict(),
        "hosts": None if launch is None else launch.cluster.names,
        "link_delay_ms": measurement.link_delay_ms,
        "speculate": run.speculate,
        "sums": next((choice.to_dict() for choice in all_reduce if choice), None),
        "dtype": _dtype_name(run.dtype, setup.config),
        "date": machine.now(),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "roofline": None if setup.roofline is None else setup.roofline.to_dict(),
    }


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


def _target(run: RunOptions, synthetic: str | None) -> ModelRef | None:
    """Return the model to measure; None for a synthetic one."""
    if synthetic is None:
        return resolve_model_name(run.model_name)
    if run.model is not None:
        raise UsageError(f"`{run.model}` and --synthetic exclude each other", hint="leave one of them out")
    return None


def _folder(target: ModelRef | None, synthetic: str | None, ranks: int, strategy: str, is_quiet: bool) -> Path:
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

    return replace(local_cluster(ranks, fast_sync), hostfile_rewriter=stack.enter_context(slow_links(delay_ms)))


def _delayed_link(delay_ms: float | None) -> LinkProfile | None:
    """The same as the planner sees it."""
    return None if not delay_ms else measured_link(2 * delay_ms / 1000, LOOPBACK_BYTES_PER_S)


def _energy(stack: ExitStack) -> EnergyOf | None:
    """Return the power measurement of this machine; None if it has none."""
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
    """Load mlx-lm in each mode that supports the model; print the others and fail if there is none."""
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
    """Return the runs and the error that ended them early, if any; raise it if only warm-ups have run."""
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
