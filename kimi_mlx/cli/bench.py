"""`kimi-mlx bench`: prefill and decode speed, waiting times, memory; alone or compared."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.cli.options import MEASUREMENT, OUTPUT, JsonOption, RunOptions, refuse_mlx_launch
from kimi_mlx.errors import UsageError
from kimi_mlx.units import is_short_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kimi_mlx.bench.measure import BenchmarkPlan
    from kimi_mlx.bench.towers import TowerRow

MAX_LINK_DELAY_MS = 1000
MAX_IMAGE_SIDE = 10_000


@dataclass(frozen=True)
class MeasurementOptions:
    """Options of the measurement."""

    synthetic: Annotated[
        Literal["wide", "deep", "vision"] | None,
        typer.Option(
            "--synthetic",
            help="Measure a checkpoint of K2's shape with random weights instead of MODEL: `wide` has 8 wide layers, "
            "`deep` 61 small ones, `vision` a part of K2.5's vision tower (see --images).",
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
    images: Annotated[
        str,
        typer.Option(
            "--images",
            metavar="N,N,...",
            help="Number of images before each prompt; the time of the vision tower is shown apart.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = "0"
    image_size: Annotated[
        str,
        typer.Option(
            "--image-size", metavar="WxH", help="Width and height of the images.", rich_help_panel=MEASUREMENT
        ),
    ] = "1024x768"
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
        Literal["mlx-lm", "mlx-lm-tensor", "mlx-lm-pipeline", "mlx-vlm", "resident"] | None,
        typer.Option(
            "--against",
            help="`mlx-lm`: also run mlx-lm on the same checkpoint, alternating, and print the ratios; on several "
            "ranks in both of its modes, or as `mlx-lm-tensor` or `mlx-lm-pipeline` in one. `mlx-vlm`: with "
            "--images, also compare the vision tower alone, with random weights, with that of mlx-vlm. `resident`: "
            "with --expert-memory, also run the model with all experts in memory, alternating.",
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
            _numbers("--images", self.images, "1,4"),
            _size(self.image_size),
        )

    def check_images(self, plan: BenchmarkPlan) -> None:
        """Check that the program to compare with can run the plan, before anything is loaded.

        Raises:
            UsageError: mlx-lm with images, or mlx-vlm without images or not installed.
        """
        if plan.has_images and self.against is not None and self.against.startswith("mlx-lm"):
            raise UsageError("mlx-lm does not see images", hint="use `--against mlx-vlm`, which compares the tower")
        if self.against == "mlx-vlm":
            if not plan.has_images:
                raise UsageError("--against mlx-vlm compares vision towers", hint="add for example `--images 1,4`")
            from kimi_mlx.bench.mlx_vlm_tower import require_mlx_vlm

            require_mlx_vlm()

    def check_delay(self, ranks: int) -> None:
        """Check that a delay has links between several ranks on this machine, and is in range.

        Raises:
            UsageError: the delay is out of range, or there is only one rank.
        """
        delay_ms = self.link_delay_ms
        if delay_ms is None:
            return
        if not 0 <= delay_ms <= MAX_LINK_DELAY_MS:
            raise UsageError(
                f"--link-delay-ms is {delay_ms:g}, not from 0 to {MAX_LINK_DELAY_MS}",
                hint="for example --link-delay-ms 4",
            )
        if ranks == 1:
            raise UsageError("--link-delay-ms is for several ranks on this machine", hint="add for example `--ranks 2`")


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
            help="Draw decode over depth and first token over prompt length as a PNG (needs matplotlib).",
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
    # heavy imports: not for `--help` or a usage error
    from kimi_mlx.bench.report import Report
    from kimi_mlx.cli.bench_models import open_models
    from kimi_mlx.cli.bench_output import Output
    from kimi_mlx.cli.bench_runs import collect_runs, collect_towers, power_measurement
    from kimi_mlx.cli.open_model import launch_context
    from kimi_mlx.cli.output import hides_messages
    from kimi_mlx.runtime.load import compute_dtype

    is_quiet = hides_messages(report.json)
    output = Output(report.json, report.markdown, report.output, report.plot)
    output.check()
    launch = launch_context(context)
    measurement.check_delay(run.ranks if launch is None else 1)
    plan = measurement.plan()
    measurement.check_images(plan)
    with ExitStack() as stack:
        models = open_models(launch, run, measurement, plan, is_quiet, stack)
        plan = models.plan
        energy_of = power_measurement(stack) if launch is None else None
        settings = models.settings(run, measurement)
        runs, stop = collect_runs(models.sides, plan, models.config, energy_of, is_quiet)
    towers: Sequence[TowerRow] = ()
    if measurement.against == "mlx-vlm" and stop is None:
        towers = collect_towers(models.config, plan, compute_dtype(run.dtype, models.config), is_quiet)
    roofline = models.roofline
    share_of = None if roofline is None else roofline.share
    output.show(Report(plan, settings, runs, models.sides, share_of, towers, models.predict), stop)


def _size(text: str) -> tuple[int, int]:
    """Parse a size such as `1024x768`."""
    numbers = text.lower().split("x")
    if len(numbers) != 2 or not all(is_short_number(side) and 1 <= int(side) <= MAX_IMAGE_SIDE for side in numbers):
        raise UsageError(
            f"--image-size is `{text}`, not a width and a height of 1 to {MAX_IMAGE_SIDE} pixels",
            hint="use for example --image-size 1024x768",
        )
    width, height = map(int, numbers)
    return width, height


def _numbers(option: str, text: str, example: str) -> tuple[int, ...]:
    """Parse a list of numbers such as `128,512`; repeated ones count once."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(
            f"{option} is `{text}`, not whole numbers with commas between them",
            hint=f"use for example {option} {example}",
        ) from None
