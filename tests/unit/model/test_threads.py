"""A model that one thread has built runs in others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.weights.assemble import load_model
from tests.checkpoints import load_golden, write_checkpoint


def logits(model: Model, ids: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(ids)))


def test_a_model_built_in_one_thread_runs_in_ten_others(tmp_path: Path) -> None:
    golden = load_golden("k2")
    folder = write_checkpoint(tmp_path / "k2", golden.config, golden.seed)
    with ThreadPoolExecutor(1) as builder:
        model = builder.submit(load_model, folder, load_config(folder), mx.float32).result()
    for _ in range(10):
        with ThreadPoolExecutor(1) as thread:
            got = thread.submit(logits, model, golden.input_ids[:, :12]).result()
        np.testing.assert_allclose(got, golden.logits[:, :12], rtol=1e-3, atol=1e-3)
