"""The roofline of decode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.bench.measure import Case
from kimi_mlx.bench.roofline import Bandwidth, Roofline, measured_bandwidth
from kimi_mlx.model.config import load_config
from kimi_mlx.planner.model_shape import shape_of_config
from tests.bench.tiny import write_tiny


def test_a_token_reads_all_weights_except_embedding_norms_and_idle_experts(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    config = load_config(folder)
    shape = shape_of_config("tiny", replace(config, dtype="float32"))
    idle_bytes = shape.moe_layers * (config.n_routed_experts - config.num_experts_per_tok) * shape.bytes.expert
    roofline = Roofline(shape, Bandwidth(1e9, "test"), generation_tokens=4)
    weights = shape.weights_bytes - shape.bytes.embedding - idle_bytes
    cache = (10 + 20 + 2) * 3 * (64 + 32) * 4
    assert roofline.bytes_per_token(Case(10, 20, 1)) == pytest.approx(weights + cache)
    assert roofline.share(Case(10, 20, 1), 100) == pytest.approx(100 * (weights + cache) / 1e9)
    assert roofline.share(Case(10, 20, 2), 100) is None


@pytest.mark.slow
def test_the_bandwidth_is_measured_if_the_chip_is_unknown() -> None:
    bandwidth = measured_bandwidth()
    assert 1e8 < bandwidth.bytes_per_s < 1e13
    assert "measured here" in bandwidth.source
