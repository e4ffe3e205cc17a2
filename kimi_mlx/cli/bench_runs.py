"""The runs of `kimi-mlx bench`, behind a progress bar; an early end keeps those that are complete."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager

import mlx.core as mx
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from kimi_mlx.bench.measure import BenchmarkPlan, EnergyOf, Run, measure
from kimi_mlx.bench.power import can_measure_power, power_log
from kimi_mlx.bench.sides import Side
from kimi_mlx.bench.towers import TowerRow, measure_towers
from kimi_mlx.cli.output import NARROW, WIDE, LabelColumn, bar_columns, slow_status, stderr
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.units import format_rate


def power_measurement(stack: ExitStack) -> EnergyOf | None:
    """Return the power measurement of this machine; None if it has none."""
    return stack.enter_context(power_log()).energy_j if can_measure_power() else None


def collect_runs(
    sides: Sequence[Side], plan: BenchmarkPlan, config: ModelConfig, energy_of: EnergyOf | None, is_quiet: bool
) -> tuple[list[Run], BaseException | None]:
    """Run all cases on all sides.

    Args:
        sides: loaded models.
        plan: cases.
        config: configuration of the model.
        energy_of: power measurement; None for none.
        is_quiet: whether to show no progress.

    Returns:
        The runs, and the error or interrupt that ended them early, if any.

    Raises:
        KimiMlxError: an error before the first measured run.
        KeyboardInterrupt: Ctrl-C before the first measured run.
    """
    runs: list[Run] = []
    placeholder_id = 0 if config.vision is None else config.vision.media_placeholder_token_id
    try:
        with _run_progress(sides, plan, is_quiet) as advance:
            for run in measure(sides, plan, config.vocab_size, energy_of, placeholder_id):
                runs.append(run)
                advance(run)
    except (KeyboardInterrupt, KimiMlxError) as stop:
        if all(run.is_warmup for run in runs):
            raise
        return runs, stop
    return runs, None


def collect_towers(config: ModelConfig, plan: BenchmarkPlan, dtype: mx.Dtype, is_quiet: bool) -> list[TowerRow]:
    """Measure the vision tower alone against mlx-vlm's, behind a status.

    Raises:
        WeightsError: mlx-vlm refuses the weights.
    """
    assert config.vision is not None
    with slow_status(is_quiet) as set_status:
        set_status("measuring the vision towers")
        return measure_towers(config.vision, plan, dtype)


@contextmanager
def _run_progress(sides: Sequence[Side], plan: BenchmarkPlan, is_quiet: bool) -> Generator[Callable[[Run], None]]:
    """Show a progress bar of runs on stderr of a terminal.

    Yields:
        function to call after each run.
    """
    progress = Progress(
        LabelColumn(reserved=20 if stderr.width < NARROW else 30 if stderr.width < WIDE else 60),
        *bar_columns(),
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
