"""Checkpoints to convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import FORMATS, load_golden, quantize_checkpoint, write_checkpoint


@pytest.fixture(scope="package")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in the published formats, and in the variants of MLX's."""
    folder = tmp_path_factory.mktemp("sources")
    golden = load_golden("k2")
    plain = write_checkpoint(folder / "float32", golden.config, golden.seed)
    half = write_checkpoint(folder / "bfloat16", golden.config, golden.seed, "bfloat16")
    path = "model.layers.1.mlp.switch_mlp.up_proj"
    options: dict[str, Any] = {"bits": 4, "group_size": 32}
    mixed = {path: {"bits": 6, "group_size": 32}, "lm_head": False}
    return {
        **{name: FORMATS / name for name in ("bf16", "fp8", "int4", "int4-k2.5")},
        "float32": plain,
        "affine": quantize_checkpoint(half, folder / "affine", **options, dtype="bfloat16"),
        "affine, one by one": quantize_checkpoint(half, folder / "one", **options, stack_experts=False),
        "affine, mixed": quantize_checkpoint(half, folder / "mixed", **options, overrides=mixed),
        "affine, whole kv_b": quantize_checkpoint(half, folder / "whole", **options, split_kv_b=False),
    }
