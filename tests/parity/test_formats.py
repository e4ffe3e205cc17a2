"""Logits of every stored format equal those of its dequantized values.

The published formats (FP8, INT4, bfloat16) are committed checkpoints of scripts/make_formats.py, with the logits of
transformers. MLX's affine layouts are made here; their reference is our float model, which test_logits.py compares with
transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model.config import load_config
from kimi_mlx.model.config_quantization import Fp8Blocks, PackedInts
from kimi_mlx.model.decoder import Model
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.index import read_index
from tests.checkpoints import (
    FORMATS,
    Golden,
    dequantize_checkpoint,
    load_golden,
    quantize_checkpoint,
    write_checkpoint,
)
from tests.parity.test_logits import feed, relative_error

TOLERANCE = 1e-4  # measured on the CPU: below 1e-6 for every format
COMPRESSIONS = {
    "bf16": None,
    "fp8": Fp8Blocks(128, 128),
    "int4": PackedInts(4, 32),
    "int4-k2.5": PackedInts(4, 32),
}


@pytest.fixture(scope="module", params=COMPRESSIONS)
def published(request: pytest.FixtureRequest) -> Path:
    return FORMATS / request.param


@pytest.fixture(scope="module")
def model(published: Path) -> Model:
    return load_model(published, load_config(published), mx.float32)


def test_each_published_format_is_tested() -> None:
    assert sorted(folder.name for folder in FORMATS.iterdir()) == sorted(COMPRESSIONS)


def test_the_format_is_read_from_the_configuration(published: Path) -> None:
    config = load_config(published)
    assert (config.compression, config.quantization) == (COMPRESSIONS[published.name], None)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([1000], id="whole", marks=pytest.mark.slow),
        pytest.param([13], id="by-13", marks=pytest.mark.slow),
        pytest.param([88, 1], id="88-then-decode"),
    ],
)
def test_published_logits_equal_transformers(published: Path, model: Model, sizes: list[int]) -> None:
    with np.load(published / "golden.npz", allow_pickle=False) as golden:
        error = relative_error(feed(model, golden["input_ids"], sizes), golden["logits"])
    assert error < TOLERANCE, f"{published.name} {sizes}: {error:.2e}"


def test_tensors_have_the_names_and_types_of_the_published_files() -> None:
    fp8, int4, k25 = (read_index(FORMATS / name) for name in ("fp8", "int4", "int4-k2.5"))
    kv_a = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert (fp8[kv_a].dtype, fp8[kv_a].shape) == ("F8_E4M3", (288, 192))
    assert (fp8[f"{kv_a}_scale_inv"].dtype, fp8[f"{kv_a}_scale_inv"].shape) == ("F32", (3, 2))
    expert = "model.layers.1.mlp.experts.7.down_proj.weight"
    stored = {suffix: int4[f"{expert}_{suffix}"] for suffix in ("packed", "scale", "shape")}
    assert {suffix: info.dtype for suffix, info in stored.items()} == {"packed": "I32", "scale": "BF16", "shape": "I64"}
    assert [info.shape for info in stored.values()] == [(96, 8), (96, 2), (2,)]
    assert k25[f"language_model.{expert}_shape"].dtype == "I32"
    for table, prefix in ((fp8, ""), (int4, ""), (k25, "language_model.")):
        types = {name: table[f"{prefix}{name}"].dtype for name in ("lm_head.weight", "model.embed_tokens.weight")}
        assert set(types.values()) == {"BF16"}
        assert table[f"{prefix}model.layers.1.mlp.gate.weight"].dtype == "BF16"
        assert table[f"{prefix}model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "F32"


LAYOUTS: dict[str, dict[str, Any]] = {
    "mlx-lm": {},
    "kv_b whole": {"split_kv_b": False},
    "experts one by one": {"stack_experts": False},
    "as on the hub": {"split_kv_b": False, "stack_experts": False},
}
QUICK = [
    *((bits, 32 if bits % 2 else 64, "mlx-lm") for bits in (2, 3, 8)),
    (4, 32, "as on the hub"),
]
ALL = [
    (bits, group_size, layout)
    for bits in (2, 3, 4, 5, 6, 8)
    for group_size in (32, 64)
    for layout in LAYOUTS
    if (bits, group_size, layout) not in QUICK
]
SLOW = [case for case in ALL if case[2] == "mlx-lm" or case[:2] in ((2, 64), (3, 32))]
SWEEP = [case for case in ALL if case not in SLOW]


FloatCheckpoints = Callable[[str], tuple[Golden, Path]]


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> FloatCheckpoints:
    """Return a function that writes the float checkpoint of a golden, in bfloat16 as published, once per name."""

    @cache
    def make(name: str) -> tuple[Golden, Path]:
        golden = load_golden(name)
        folder = tmp_path_factory.mktemp("floats") / name
        return golden, write_checkpoint(folder, golden.config, golden.seed, "bfloat16")

    return make


def affine_errors(source: tuple[Golden, Path], folder: Path, **options: Any) -> list[float]:
    """Return the errors of an affine checkpoint against the float model of its values, computed whole and in chunks."""
    golden, float_folder = source
    quantized = quantize_checkpoint(float_folder, folder / "affine", dtype="bfloat16", **options)
    plain = dequantize_checkpoint(quantized, folder / "plain")
    ids = golden.input_ids[:, :20]
    expected = np.asarray(load_model(plain, load_config(plain), mx.float32)(mx.array(ids)))
    model = load_model(quantized, load_config(quantized), mx.float32)
    return [relative_error(feed(model, ids, sizes), expected) for sizes in ([1000], [16, 3, 1])]


@pytest.mark.parametrize(
    ("bits", "group_size", "layout"),
    [
        *QUICK,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
        *(pytest.param(*case, marks=pytest.mark.sweep) for case in SWEEP),
    ],
)
def test_affine_logits_equal_those_of_their_values(
    bits: int, group_size: int, layout: str, floats: FloatCheckpoints, tmp_path: Path
) -> None:
    options = {"bits": bits, "group_size": group_size, **LAYOUTS[layout]}
    assert max(affine_errors(floats("k2"), tmp_path, **options)) < TOLERANCE


OVERRIDES: dict[str, dict[str, dict[str, int] | bool]] = {
    "mixed bits": {
        "lm_head": {"bits": 6, "group_size": 64},
        "model.embed_tokens": {"bits": 8, "group_size": 32},
        "model.layers.1.mlp.switch_mlp.down_proj": {"bits": 6, "group_size": 32},
        "model.layers.2.self_attn.o_proj": {"bits": 8, "group_size": 64},
    },
    "mixed groups": {
        "model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 64},
        "model.layers.1.mlp.switch_mlp.gate_proj": {"bits": 4, "group_size": 64},
        "model.layers.1.mlp.shared_experts.down_proj": {"bits": 4, "group_size": 64},
    },
    "unquantized matrices": {
        "lm_head": False,
        "model.embed_tokens": False,
        "model.layers.0.mlp.gate_proj": False,
        "model.layers.1.mlp.switch_mlp.up_proj": False,
        "model.layers.2.mlp.shared_experts.down_proj": False,
        "model.layers.2.self_attn.kv_a_proj_with_mqa": False,
    },
    "halves of kv_b": {
        "model.layers.0.self_attn.embed_q": {"bits": 8, "group_size": 64},
        "model.layers.1.self_attn.unembed_out": False,
        "model.layers.2.self_attn.embed_q": False,
    },
}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *(pytest.param("k2", overrides, marks=pytest.mark.slow) for overrides in OVERRIDES),
        ("k2.5", "mixed bits"),
        *(pytest.param("moonlight", overrides, marks=pytest.mark.slow) for overrides in OVERRIDES),
    ],
)
def test_logits_with_overrides_equal_those_of_their_values(
    name: str, overrides: str, floats: FloatCheckpoints, tmp_path: Path
) -> None:
    source = floats(name)
    prefix = "language_model." if "text_config" in source[0].config else ""
    paths = {prefix + path: choice for path, choice in OVERRIDES[overrides].items()}
    assert max(affine_errors(source, tmp_path, bits=4, group_size=32, overrides=paths)) < TOLERANCE
