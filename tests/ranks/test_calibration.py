"""The calibration on real ranks: all strategies are timed, and no process is left."""

from __future__ import annotations

import pytest

from kimi_mlx.bench.workloads import synthetic_config
from kimi_mlx.cluster.hosts.host import local_cluster
from kimi_mlx.model.config import parse_config
from kimi_mlx.planner.model_shape import shape_of_config
from kimi_mlx.session.calibrate import calibrate

pytestmark = pytest.mark.ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_all_strategies_are_timed(ranks: int) -> None:
    config = synthetic_config("deep", hidden_size=128, moe_intermediate_size=64, intermediate_size=128)
    calibration = calibrate(local_cluster(ranks), shape_of_config("small", parse_config(config)))
    strategies = {prediction.strategy for prediction in calibration.predictions()}
    assert strategies == ({"single"} if ranks == 1 else {"pipeline", "hybrid", "tensor"})
    assert all(prediction.decode_tok_per_s > 0 for prediction in calibration.predictions())
    assert all(0 < times.one_s < times.many_s for times in calibration.layers.values())
    assert (calibration.sums.one_s > 0) == (ranks > 1)
