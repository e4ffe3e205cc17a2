"""The models that `kimi-mlx bench` measures, on launched hosts or on this machine, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kimi_mlx.bench import machine
from kimi_mlx.bench.measure import BenchmarkPlan
from kimi_mlx.bench.mlx_lm_side import MODES, open_mlx_lm
from kimi_mlx.bench.prediction import Predict, calibrated_predictor, predictor_here
from kimi_mlx.bench.roofline import Roofline
from kimi_mlx.bench.sides import SessionSide, Side
from kimi_mlx.bench.slow_link import slow_links
from kimi_mlx.bench.workloads import synthetic_checkpoint, synthetic_config
from kimi_mlx.cli.bench import MeasurementOptions
from kimi_mlx.cli.bench_resident import check_setting, open_resident_sides
from kimi_mlx.cli.calibration import calibrate_on
from kimi_mlx.cli.open_model import (
    LaunchContext,
    PreparedModel,
    open_session,
    options_on_this_machine,
    place_model,
    prepare_model,
    session_options,
)
from kimi_mlx.cli.options import RunOptions
from kimi_mlx.cli.output import closing_with_status, load_progress, slow_status, stderr
from kimi_mlx.cli.vision_check import require_vision, require_vision_in_catalogue
from kimi_mlx.cluster.hosts.host import Cluster, local_cluster
from kimi_mlx.errors import KimiMlxError, UsageError
from kimi_mlx.images.preprocessing import Preprocessing
from kimi_mlx.model.config import ModelConfig, load_config, parse_config
from kimi_mlx.planner.expectation import Expectation
from kimi_mlx.planner.model_shape import shape_of_config
from kimi_mlx.runtime.load import compute_dtype
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.store.model_ref import resolve_model_name


@dataclass(frozen=True)
class BenchmarkModels:
    """Loaded models to compare.

    Attributes:
        prepared: the model with its placement.
        sides: kimi-mlx, then what it is compared with: each mode of mlx-lm, or all experts in memory.
        config: dimensions of the model.
        plan: cases to run, with the model's settings for images.
        roofline: limit by this machine's memory bandwidth; None on launched hosts.
        predict: prediction of the calibration, else the planner's for one rank on this machine; None where none is.
        expectation: what to expect of experts on the SSD; None if all are in memory.
    """

    prepared: PreparedModel
    sides: Sequence[Side]
    config: ModelConfig
    plan: BenchmarkPlan
    roofline: Roofline | None = None
    predict: Predict | None = None
    expectation: Expectation | None = None

    def settings(self, run: RunOptions, measurement: MeasurementOptions) -> dict[str, Any]:
        """Return the settings of the benchmark, for its report."""
        launch = self.prepared.launch
        all_reduce = (side.all_reduce for side in self.sides if isinstance(side, SessionSide))
        return {
            "model": self.prepared.name,
            "ranks": run.ranks if launch is None else launch.cluster.size,
            "placement": self.prepared.choice.to_dict(),
            "experts": None if self.expectation is None else self.expectation.to_dict(),
            "hosts": None if launch is None else launch.cluster.names,
            "link_delay_ms": measurement.link_delay_ms,
            "predictions": self._predictions(),
            "draft": run.used_draft,
            "speculate": run.speculate,
            "sums": next((choice.to_dict() for choice in all_reduce if choice), None),
            "dtype": _dtype_name(run.dtype, self.config),
            "date": machine.now(),
            "machine": machine.machine(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "roofline": None if self.roofline is None else self.roofline.to_dict(),
        }

    def _predictions(self) -> list[dict[str, Any]]:
        """Return the predicted speeds of the strategy that runs, for each prompt length; none without a calibration."""
        choice = self.prepared.choice
        if choice.calibration is None:
            return []
        return [
            {"prompt_tokens": tokens, **asdict(prediction)}
            for tokens in self.plan.prompt_tokens
            if (prediction := choice.calibration.prediction(choice.strategy, tokens)) is not None
        ]


def _predictor(prepared: PreparedModel, config: ModelConfig, ranks: int) -> Predict | None:
    """Return the prediction of the calibration, else the planner's for one rank on this machine, if it has one."""
    choice = prepared.choice
    if choice.calibration is not None:
        return calibrated_predictor(choice.calibration, choice.strategy)
    return predictor_here(config) if ranks == 1 else None


def open_models(
    launch: LaunchContext | None,
    run: RunOptions,
    measurement: MeasurementOptions,
    plan: BenchmarkPlan,
    is_quiet: bool,
    stack: ExitStack,
) -> BenchmarkModels:
    """Load all models that are measured.

    Args:
        launch: launched hosts; None for this machine.
        run: options of the model.
        measurement: options of the measurement.
        plan: cases to run, which must fit in the model's context.
        is_quiet: whether to print neither progress nor notices.
        stack: closes the models.

    Raises:
        KimiMlxError: a model cannot be loaded, or the plan does not fit.
    """
    cluster = _cluster(run.ranks, measurement.link_delay_ms, run.fast_sync, stack)
    prepared = _prepare(launch, run, measurement, plan, cluster, is_quiet)
    if prepared.folder is not None:  # before loading
        if plan.has_images:
            require_vision(prepared.folder, prepared.name)
        context = load_config(prepared.folder).max_position_embeddings
        _with_preprocessing(plan, prepared.folder).check_context(context)
    options = replace(session_options(run), cluster=cluster if run.ranks > 1 else None)
    if measurement.against == "resident":
        check_setting(options)
    opened = open_session(prepared, options, run.ranks, is_quiet)
    session = stack.enter_context(closing_with_status(opened.session, is_quiet))
    config = load_config(opened.tokenizer_folder)
    plan = _with_preprocessing(plan, opened.tokenizer_folder)
    plan.check_context(config.max_position_embeddings)
    if plan.has_images and session.image_error is not None:
        raise session.image_error
    sides: list[Side] = [SessionSide("kimi-mlx", session)]
    if launch is not None:
        return BenchmarkModels(prepared, sides, config, plan, expectation=opened.expectation)
    if measurement.against is not None and measurement.against in MODES:
        modes = MODES[measurement.against] if run.ranks > 1 else ("single",)
        sides += _open_mlx_lm_sides(modes, options_on_this_machine(prepared, options, run.ranks), stack, is_quiet)
    if measurement.against == "resident":
        sides = [*open_resident_sides(prepared, options, run.ranks, session, is_quiet, stack)]
    roofline = Roofline.of(config, _dtype_name(run.dtype, config), measurement.generation_tokens)
    predict = _predictor(prepared, config, run.ranks) if opened.expectation is None else None
    return BenchmarkModels(prepared, sides, config, plan, roofline, predict, opened.expectation)


def _with_preprocessing(plan: BenchmarkPlan, folder: Path) -> BenchmarkPlan:
    """Return the plan with a checkpoint's settings for images."""
    return replace(plan, preprocessing=Preprocessing.load(folder)) if plan.has_images else plan


def _prepare(
    launch: LaunchContext | None,
    run: RunOptions,
    measurement: MeasurementOptions,
    plan: BenchmarkPlan,
    cluster: Cluster,
    is_quiet: bool,
) -> PreparedModel:
    """Place the model and find its files; a synthetic checkpoint is written first."""
    name = measurement.synthetic
    if name is None:
        target = resolve_model_name(run.model_name)
        if plan.has_images:
            require_vision_in_catalogue(target)
        return prepare_model(launch, target, run, is_quiet=is_quiet, cluster=cluster)
    if run.model is not None:
        raise UsageError(f"`{run.model}` and --synthetic exclude each other", hint="leave one of them out")
    shape = shape_of_config(name, parse_config(synthetic_config(name)))
    choice = place_model(
        None, run.ranks, run.strategy, is_quiet=is_quiet, cluster=cluster, shape=shape, dtype=run.dtype
    )
    if choice.calibration is None:  # measured here too where nothing is chosen: the report compares
        choice = replace(choice, calibration=calibrate_on(cluster, is_quiet, run.dtype)(shape))
    with load_progress(f"making the checkpoint `{name}`", is_quiet) as progress:
        return PreparedModel(None, name, choice, synthetic_checkpoint(name, progress))


def _dtype_name(dtype: str | None, config: ModelConfig) -> str:
    """Return the name of the type that both sides compute in."""
    return str(compute_dtype(dtype, config)).removeprefix("mlx.core.")


def _cluster(ranks: int, delay_ms: float | None, fast_sync: bool, stack: ExitStack) -> Cluster:
    """Return ranks on this machine, with delayed links between them if there is a delay."""
    cluster = local_cluster(ranks, fast_sync)
    if delay_ms is None:
        return cluster
    return replace(cluster, hostfile_rewriter=stack.enter_context(slow_links(delay_ms)))


def _open_mlx_lm_sides(modes: Sequence[str], options: SessionOptions, stack: ExitStack, is_quiet: bool) -> list[Side]:
    """Load mlx-lm in each mode that supports the model; print why the others are left out, and fail if none is left."""
    sides: list[Side] = []
    failure: KimiMlxError | None = None
    for mode in modes:
        try:
            with slow_status(is_quiet) as set_status:
                set_status(f"loading mlx-lm ({mode})")
                sides.append(stack.enter_context(open_mlx_lm(options, mode)))
        except KimiMlxError as error:
            failure = error
            stderr.print(f"left out: {error.message}", style="yellow", markup=False)
    if not sides and failure is not None:
        raise failure
    return sides
