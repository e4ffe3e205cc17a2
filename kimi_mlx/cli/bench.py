"""`kimi-mlx bench`: prefill and decode speed, time to first token and memory; alone or against mlx-lm."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kimi_mlx.cli.launched import launched_of, open_launched
from kimi_mlx.cli.obtain import obtain
from kimi_mlx.cli.options import (
    DtypeOption,
    FastSyncOption,
    JsonOption,
    ModelArgument,
    RanksOption,
    StrategyOption,
    refuse_launcher,
)
from kimi_mlx.cli.output import load_progress, print_json, stderr, stdout
from kimi_mlx.cli.placing import announce, place_here
from kimi_mlx.errors import KimiMlxError, UsageError
from kimi_mlx.runtime.session import SessionOptions
from kimi_mlx.settings import Settings
from kimi_mlx.store.locate import Target, understand
from kimi_mlx.units import format_rate

if TYPE_CHECKING:
    from kimi_mlx.bench.measure import Plan, Run
    from kimi_mlx.bench.sides import Side


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
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Repetitions that do not count.")] = 1,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Repetitions that count.")] = 5,
    ranks: RanksOption = 1,
    strategy: StrategyOption = None,
    dtype: DtypeOption = None,
    fast_sync: FastSyncOption = False,
    against: Annotated[
        Literal["mlx-lm"] | None,
        typer.Option("--against", help="Run mlx-lm on the same checkpoint in turns, and print the ratios."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the prompts.")] = 0,
    json: JsonOption = False,
) -> None:
    """Measure a model: prefill and decode tok/s, time to first token, peak memory."""
    from kimi_mlx.bench import report
    from kimi_mlx.bench.measure import Plan, measure
    from kimi_mlx.bench.sides import SessionSide
    from kimi_mlx.model.config import load_config

    refuse_launcher()
    plan = Plan(_sizes(prompt_tokens), generation_tokens, warmup, repeat, seed)
    launched = launched_of(context)
    with ExitStack() as stack:
        if launched is not None:
            target = understand(model or Settings.from_environment().model)
            session = stack.enter_context(closing(open_launched(launched, target, dtype, False, json)))
            folder, sides = session.text_folder, [SessionSide("kimi-mlx", session)]
            ranks, choice = launched.cluster.size, launched.choice
        else:
            target = _target(model, synthetic)
            choice = place_here(target, ranks, strategy)
            folder = _folder(target, synthetic, ranks, choice.strategy, json)
            plan.check_context(load_config(folder).max_position_embeddings)
            announce(choice, f"{ranks} ranks", is_quiet=json or ranks == 1)
            options = SessionOptions(folder, ranks, dtype, choice.strategy, fast_sync=fast_sync)
            sides = stack.enter_context(_open_sides(options, against, json))
        config = load_config(folder)
        plan.check_context(config.max_position_embeddings)
        settings = {
            "model": synthetic or model or Settings.from_environment().model,
            "ranks": ranks,
            "placement": choice.to_dict(),
            "hosts": None if launched is None else launched.cluster.names,
            "dtype": _dtype_name(dtype, folder),
            "sums": next((each.sums.to_dict() for each in sides if isinstance(each, SessionSide) and each.sums), None),
            "machine": report.machine(),
            "versions": report.versions(),
        }
        with _run_progress(sides, plan, json) as advance:
            runs = measure(sides, plan, config.vocab_size, advance)
    if json:
        print_json(report.to_dict(runs, plan, settings))
        return
    stdout.print(report.heading(settings, plan), style="dim", markup=False)
    stdout.print(report.result_table(report.rows(runs)))
    for line in report.summary_lines(runs):
        stdout.print(line, markup=False)


def _sizes(text: str) -> tuple[int, ...]:
    """Prompt sizes from `128,512`."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(
            f"--prompt-tokens is `{text}`, not whole numbers with commas between them",
            hint="use for example --prompt-tokens 128,512",
        ) from None


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
        return obtain(target, ranks, strategy, is_quiet)
    assert synthetic is not None
    from kimi_mlx.bench.workloads import synthetic_checkpoint

    with load_progress(f"making the checkpoint `{synthetic}`", is_quiet) as progress:
        return synthetic_checkpoint(synthetic, progress)


def _dtype_name(dtype: str | None, folder: Path) -> str:
    """The type that both sides compute in."""
    from kimi_mlx.model.config import load_config
    from kimi_mlx.runtime.load import compute_type

    return str(compute_type(dtype, load_config(folder))).removeprefix("mlx.core.")


@contextmanager
def _open_sides(options: SessionOptions, against: str | None, is_quiet: bool) -> Generator[list[Side]]:
    """Load kimi-mlx and, if asked, mlx-lm in each way that it can run the model."""
    from kimi_mlx.bench.sides import open_kimi_mlx

    with ExitStack() as stack:
        with load_progress("loading kimi-mlx", is_quiet) as progress:
            sides: list[Side] = [stack.enter_context(open_kimi_mlx(options, progress))]
        if against is not None:
            sides += _open_mlx_lm_sides(options, stack)
        yield sides


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


@contextmanager
def _run_progress(sides: Sequence[Side], plan: Plan, is_quiet: bool) -> Generator[Callable[[Run], None]]:
    """A bar of requests done, on stderr of a terminal; yields what to call after each."""
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
            statistics = run.statistics
            speed = format_rate(statistics.decode_tok_per_s)
            progress.update(task, advance=1, description=f"prompt {statistics.prompt_tokens}, {run.side}: {speed}")

        yield advance
