"""A checkpoint with damaged headers or another configuration loads, or is refused with an error of ours."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_mlx.errors import KimiMlxError
from kimi_mlx.model.config import load_config
from kimi_mlx.weights.assemble import load_model
from tests.checkpoints import FORMATS
from tests.examples import examples

Header = dict[str, dict[str, Any]]

DTYPES = ["F32", "F16", "BF16", "U32", "I32", "U8", "F8_E4M3", "I64", "BOOL", "F4"]
KINDS = ["weight", "scales", "biases", "weight_packed", "weight_scale", "weight_scale_inv", "weight_shape"]
BLOCKS = [
    {"bits": 4, "group_size": 32},
    {"bits": 8, "group_size": 64},
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    {"quant_method": "fp8", "weight_block_size": [64, 7]},
]


def change_dtype(header: Header, name: str, choose: random.Random) -> None:
    header[name]["dtype"] = choose.choice(DTYPES)


def change_shape(header: Header, name: str, choose: random.Random) -> None:
    shape = header[name]["shape"]
    header[name]["shape"] = choose.choice([shape[::-1], [], [*shape, 1], [1, *shape], [2 * size for size in shape]])


def remove(header: Header, name: str, choose: random.Random) -> None:
    del header[name]


def rename(header: Header, name: str, choose: random.Random) -> None:
    header[f"{name.rpartition('.')[0]}.{choose.choice(KINDS)}"] = header.pop(name)


def replace(header: Header, name: str, choose: random.Random) -> None:
    header[name] = dict(header[choose.choice(sorted(header))])


CHANGES: list[Callable[[Header, str, random.Random], None]] = [change_dtype, change_shape, remove, rename, replace]


def damage(source: Path, folder: Path, choose: random.Random) -> None:
    """Write a copy of a checkpoint with one to three changes."""
    config = json.loads((source / "config.json").read_text())
    if choose.random() < 0.3:
        text = config.get("text_config", config)
        text[choose.choice(["quantization", "quantization_config"])] = choose.choice([*BLOCKS, None])
    (folder / "config.json").write_text(json.dumps(config))
    files = sorted(source.glob("*.safetensors"))
    for file in files:
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        header.pop("__metadata__", None)
        for _ in range(choose.randint(0, 2)):
            choose.choice(CHANGES)(header, choose.choice(sorted(header)), choose)
        text = json.dumps(header).encode()
        (folder / file.name).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize("name", ["fp8", "int4", "int4-k2.5", "bf16"])
@settings(examples(12), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choose=st.randoms(use_true_random=False))
def test_a_damaged_checkpoint_loads_or_is_refused(name: str, tmp_path: Path, choose: random.Random) -> None:
    damage(FORMATS / name, tmp_path, choose)
    with contextlib.suppress(KimiMlxError):
        load_model(tmp_path, load_config(tmp_path), mx.float32)
