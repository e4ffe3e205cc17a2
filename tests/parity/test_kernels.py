"""Kernel dispatches of a decode step, counted on the lazy graph."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from io import StringIO
from pathlib import Path

import mlx.core as mx
import pytest

from kimi_mlx.model import attention, moe, rope
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import SequenceSlice
from kimi_mlx.model.device_traits import METAL_TUNING
from kimi_mlx.planner.constants import KIMI_MLX
from kimi_mlx.weights.assemble import load_model
from tests.checkpoints import load_golden, quantize_checkpoint, write_checkpoint

VIEWS = {
    "Reshape",
    "Transpose",
    "Slice",
    "ExpandDims",
    "Squeeze",
    "Broadcast",
    "Split",
    "Flatten",
    "Unflatten",
    "AsStrided",
}


def one_kernel(x: mx.array, *args: object, **kwargs: object) -> mx.array:
    """Replaces mx.fast.rms_norm and mx.fast.rope: several kernels on the CPU, one each on Metal."""
    return mx.abs(x)


def count_dispatches(output: mx.array) -> Counter[str]:
    """Return the primitives in the graph of `output`, without views."""
    dot = StringIO()
    mx.export_to_dot(dot, output)
    names = re.findall(r'label ?="([A-Za-z]+)[^"]*", shape=rectangle', dot.getvalue())
    return Counter(name for name in names if name not in VIEWS)


@pytest.fixture
def metal_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count as Metal would run it: fast norms and rotations, compiled elementwise chains."""
    monkeypatch.setattr(mx.fast, "rms_norm", one_kernel)
    monkeypatch.setattr(mx.fast, "rope", one_kernel)
    monkeypatch.setattr(rope, "is_gpu", lambda: True)
    for name in ("swiglu", "router_scores"):
        monkeypatch.setattr(moe, name, mx.compile(getattr(moe, name)))
    monkeypatch.setattr(moe, "elementwise", mx.compile)
    for module in (moe, attention):
        monkeypatch.setattr(module, "device_kind", lambda: "metal")


def decode_graph(folder: Path, layers: int, dtype: mx.Dtype) -> Counter[str]:
    """Return the graph of one decode step with the first `layers` layers."""
    config = load_config(folder)
    model = load_model(folder, config, dtype)
    model.layers = model.layers[:layers]
    cache = model.make_cache()
    mx.eval(model(mx.array([[1, 2, 3]]), cache), [layer.state for layer in cache])
    return count_dispatches(model(mx.array([[4]]), cache))


def batch_graph(folder: Path, layers: int, num_sequences: int, new: int) -> Counter[str]:
    """Return the graph of a step of sequences with about 4,000 tokens each, tuned for Metal.

    It is the second step of the batch: the first one has stacked the caches.
    """
    config = load_config(folder)
    model = load_model(folder, config, mx.float32)
    model.tune(METAL_TUNING)
    model.layers = model.layers[:layers]
    caches = [model.make_cache() for _ in range(num_sequences)]
    for number, layer in ((number, layer) for number, cache in enumerate(caches) for layer in cache):
        layer.append(mx.zeros((1, 1, 4_000 + 11 * number, config.kv_lora_rank + config.qk_rope_head_dim)))
    tokens = mx.zeros((1, num_sequences * new), mx.int32)
    slices = [SequenceSlice(cache, new, new) for cache in caches]
    mx.eval(model.hidden(tokens, slices), [layer.state for cache in caches for layer in cache])
    return count_dispatches(model.hidden(tokens, slices))


needs_compiler = pytest.mark.skipif(
    not mx.metal.is_available() and shutil.which("g++") is None,
    reason="without a C++ compiler mx.compile does not fuse on the CPU",
)


@needs_compiler
@pytest.mark.parametrize("new", [pytest.param(new, marks=pytest.mark.slow) for new in (1, 4)])
def test_sixteen_long_sequences_take_at_most_twice_the_dispatches_of_one(
    tmp_path: Path, metal_like: None, new: int
) -> None:
    golden = load_golden("k2.5")
    folder = write_checkpoint(tmp_path / "float", golden.config, golden.seed)
    layer = [
        sum((batch_graph(folder, 3, count, new) - batch_graph(folder, 2, count, new)).values()) for count in (1, 16)
    ]
    assert layer[1] <= 1.6 * layer[0]
    assert sum(batch_graph(folder, 3, 16, new).values()) <= 2 * sum(batch_graph(folder, 3, 1, new).values())


@needs_compiler
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_an_moe_layer_takes_as_many_dispatches_as_the_planner_counts(
    tmp_path: Path, metal_like: None, dtype: mx.Dtype
) -> None:
    golden = load_golden("k2.5")
    source = write_checkpoint(tmp_path / "float", golden.config, golden.seed)
    folder = quantize_checkpoint(source, tmp_path / "quantized", bits=4, group_size=32)
    fewer, more = decode_graph(folder, 2, dtype), decode_graph(folder, 3, dtype)
    layer = more - fewer
    assert sum(more.values()) - sum(fewer.values()) == sum(layer.values())
    # in float32 the router's input needs no cast
    assert sum(layer.values()) == KIMI_MLX.kernels_per_layer - (dtype == mx.float32), dict(layer)
