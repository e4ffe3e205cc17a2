"""Benchmarks with images: pictures, prompts, figures, and the comparison with mlx-vlm's tower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.bench import towers
from kimi_mlx.bench.measure import BenchmarkPlan, Case, make_batch
from kimi_mlx.bench.pictures import make_picture
from kimi_mlx.bench.random_tower import build_tower, random_tower
from kimi_mlx.bench.report import Report
from kimi_mlx.bench.results import rows
from kimi_mlx.bench.workloads import SHAPES, synthetic_config, write_synthetic
from kimi_mlx.errors import UsageError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.vision_config import VisionConfig
from kimi_mlx.runtime.load import load_share
from tests.bench.runs import make_run
from tests.bench.test_report import make_report
from tests.bench.tiny import TINY
from tests.fakes import KIMI_MINI

PLAN = BenchmarkPlan((10,), 2, repeat=2, images=(0, 2), image_size=(60, 40))


def vision_config() -> VisionConfig:
    config = load_config(KIMI_MINI.with_name("kimi-mini-vl")).vision
    assert config is not None
    return config


def test_pictures_depend_on_the_seed_alone() -> None:
    one, again, other = (make_picture((60, 40), seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert one.digest == again.digest != other.digest
    assert (one.size, one.grid, one.num_tokens) == ((60, 40), (1, 4, 6), 6)
    assert np.ptp(one.patches) > 50


def test_images_are_between_the_cached_prefix_and_the_prompt() -> None:
    batch = make_batch(Case(5, 10, 2, images=2), 0, PLAN, vocab_size=50, placeholder_id=99)
    assert [(image.start, image.num_tokens) for image in batch.requests[0].images] == [(5, 6), (11, 6)]
    for request in batch.requests:
        assert len(request.prompt) == 5 + 12 + 10
        assert [at for at, id in enumerate(request.prompt) if id == 99] == list(range(5, 17))
    assert len({image.digest for request in batch.requests for image in request.images}) == 4
    following = make_batch(Case(5, 10, 2, images=2), 1, PLAN, 50, 99)
    assert following.requests[0].images[0].digest != batch.requests[0].images[0].digest


def test_the_plan_counts_the_tokens_of_images() -> None:
    assert PLAN.image_tokens == 6
    assert BenchmarkPlan(images=(4,)).image_tokens == 1036
    assert [str(case) for case in PLAN.cases] == ["prompt 10", "prompt 10, 2 images"]
    with pytest.raises(UsageError, match="prompt 22 and answer 2 need 24 tokens"):
        PLAN.check_context(23)
    with pytest.raises(UsageError, match="-1 images are not between 0 and 100"):
        BenchmarkPlan(images=(-1,))


def with_images(encode_s: float) -> Report:
    case = Case(0, 100, 1, images=2)
    run = make_run("kimi-mlx", 0, prefill=100, decode=10, case=case)
    answers = tuple(replace(answer, statistics=replace(answer.statistics, encode_s=encode_s)) for answer in run.answers)
    run = replace(run, outcome=replace(run.outcome, answers=answers), image_tokens=50)
    report = make_report([run], BenchmarkPlan((100,), 11, warmup=0, repeat=1, images=(2,)))
    return replace(report, towers=[towers.TowerRow(side, 2, 50, *SPREADS[side]) for side in ("kimi-mlx", "mlx-vlm")])


SPREADS = {
    "kimi-mlx": (towers.Spread(0.5, 0.4, 0.6), towers.Spread(100.0, 80.0, 120.0)),
    "mlx-vlm": (towers.Spread(1.0, 0.9, 1.1), towers.Spread(50.0, 45.0, 55.0)),
}


def test_encoding_and_prefill_are_apart() -> None:
    report = with_images(0.25)
    (row,) = rows(report.runs)
    assert row.encoding is not None
    assert (row.encoding.encode_s.median, row.encoding.encode_tok_per_s.median) == (0.25, 200)
    assert row.encoding.prefill_s.median == pytest.approx(0.75)
    assert row.rates["prefill_tok_per_s"].median == pytest.approx(100 / 0.75)
    text = report.markdown()
    assert "| 100 | 2 | kimi-mlx | 0.250 (0.250-0.250) | 200.0 (200.0-200.0) | 0.750 (0.750-0.750) |" in text
    assert "| 2 | 50 | mlx-vlm | 1.000 (0.900-1.100) | 50.0 (45.0-55.0) |" in text
    assert "tower alone, 2 images: kimi-mlx / mlx-vlm = 2.00" in text
    assert "images of 1024x768 (1036 tokens)" in text
    assert "encode" not in make_report().markdown()
    document = report.to_dict()
    assert document["results"][0]["encoding"]["image_tokens"] == document["towers"][0]["image_tokens"] == 50


def test_a_random_tower_has_every_weight() -> None:
    config = vision_config()
    picture = make_picture((60, 40), (0,))
    features = build_tower(config, random_tower(config, seed=0), mx.float32)(mx.array(picture.patches), [picture.grid])
    assert features.shape == (6, config.text_hidden_size)
    assert 0.1 < float(features.std()) < 10


def test_both_towers_are_measured_in_turns() -> None:
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    table = towers.measure_towers(vision_config(), PLAN, mx.float32)
    assert [(row.side, row.images, row.image_tokens) for row in table] == [("kimi-mlx", 2, 12), ("mlx-vlm", 2, 12)]
    assert all(row.encode_s.min > 0 for row in table)


def test_the_synthetic_vision_checkpoint_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = {**SHAPES["vision"]["vision_config"], "vt_hidden_size": 64, "vt_num_attention_heads": 4}
    tiny = {**TINY, "vision_config": {**vision, "vt_intermediate_size": 80, "text_hidden_size": TINY["hidden_size"]}}
    monkeypatch.setitem(SHAPES, "vision", tiny)  # pyright: ignore[reportArgumentType]
    write_synthetic(tmp_path, synthetic_config("vision"))
    config = load_config(tmp_path)
    assert config.vision is not None
    model = load_share(tmp_path, config)
    picture = make_picture((60, 40), (0,))
    features = model.image_features(mx.array(picture.patches), mx.array([picture.grid]))
    assert features.shape == (6, TINY["hidden_size"])
