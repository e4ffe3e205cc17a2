"""Measure a layer and messages on the ranks that are about to run, with a status line."""

from __future__ import annotations

from kimi_mlx.cli.output import print_warning, slow_status
from kimi_mlx.cli.placement import Calibrate
from kimi_mlx.cluster.hosts.host import Cluster
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.planner.calibration import Calibration
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.session.calibrate import calibrate


def calibrate_on(cluster: Cluster, is_quiet: bool, dtype: str | None = None) -> Calibrate:
    """Return a function that measures on a cluster.

    If the measurement fails, the function prints the error and returns None. The ranks of the model then start with the
    strategy of a rule, or fail with the same error.

    Args:
        cluster: hosts of the ranks.
        is_quiet: whether to print nothing.
        dtype: compute dtype; None for the default.
    """

    def measure(shape: ModelShape) -> Calibration | None:
        try:
            with slow_status(is_quiet) as set_status:
                set_status("measuring a layer and messages between the ranks")
                return calibrate(cluster, shape, dtype)
        except KimiMlxError as error:
            if not is_quiet:
                print_warning(f"no prediction, because nothing could be measured: {error.message}")
            return None

    return measure
