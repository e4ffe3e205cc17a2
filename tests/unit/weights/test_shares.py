"""Shares: a rank's parameters are exactly its part of the model, and the ranks hold every element of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from kimi_mlx.model.config import ModelConfig, load_config
from kimi_mlx.parallel.placement import STRATEGIES, Placement, Range, RankShare, place
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.layer_plan import plan_layer, plan_top, split_granularity_of
from kimi_mlx.weights.plan import LayerPlan
from kimi_mlx.weights.reader import open_checkpoint
from tests.divisible import CONFIGS, write_divisible

Arrays = dict[str, mx.array]

UNEVEN = {1: "", 2: ":3:1", 3: ":1:4:2", 4: ":2:1:1:3", 8: ":2:1:1:1:1:1:1:3"}


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_divisible(tmp_path_factory.mktemp("shares"), request.param, layers=8)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Arrays:
    return parameters(folder, None)


def parameters(folder: Path, share: RankShare | None) -> Arrays:
    return dict(tree_flatten(load_model(folder, load_config(folder), mx.float32, share).parameters()))


def place_folder(folder: Path, strategy: str, size: int) -> tuple[Checkpoint, Placement]:
    config = load_config(folder)
    checkpoint = open_checkpoint(folder, config).checkpoint
    return checkpoint, place(config, strategy, size, split_granularity_of(checkpoint, strategy))


def rows(array: mx.array, span: Range, axis: int = 0) -> mx.array:
    return mx.take(array, mx.arange(span.start, span.stop), axis=axis)


def columns(array: mx.array, span: Range, total: int) -> mx.array:
    """Return columns of a matrix with `total` unquantized columns; the stored ones may be packed, or one per group."""
    width = array.shape[-1]
    assert span.start * width % total == span.stop * width % total == 0
    return array[..., span.start * width // total : span.stop * width // total]


def halves(array: mx.array, span: Range) -> mx.array:
    """Return rows of gate, then the same rows of up."""
    return mx.concatenate([rows(half, span, -2) for half in mx.split(array, 2, axis=-2)], axis=-2)


class Expected:
    """A rank's parameters, sliced from those of one process by their meaning, independently of the plans."""

    def __init__(self, whole: Arrays, config: ModelConfig, share: RankShare):
        self.whole, self.config, self.share = whole, config, share

    def arrays(self) -> Arrays:
        found: Arrays = {}
        for name, array in self.whole.items():
            if name.startswith("layers."):
                _, layer, rest = name.split(".", 2)
                layers = self.share.layers
                if layers.start <= int(layer) < layers.stop:
                    prefix = f"layers.{int(layer) - layers.start}"
                    found |= {f"{prefix}.{own}": part for own, part in self._of_layer(rest, array)}
            elif part := self._of_top(name, array):
                found[name] = part[0]
        return found

    def _of_top(self, name: str, array: mx.array) -> list[mx.array]:
        if name.startswith("embed_tokens"):
            return [rows(array, self.share.embed_rows)] if len(self.share.embed_rows) else []
        if not len(self.share.vocab_rows):
            return []
        return [array if name == "norm" else rows(array, self.share.vocab_rows)]

    def _of_layer(self, name: str, array: mx.array) -> Iterator[tuple[str, mx.array]]:
        c, share = self.config, self.share
        heads = share.heads
        entry = name.rpartition(".")[0]
        by_head = Range(heads.start * c.qk_head_dim, heads.stop * c.qk_head_dim)
        if entry == "self_attn.q_b_proj":
            yield name, rows(array, by_head)
        elif entry == "self_attn.qkv_a_proj" and c.q_lora_rank is None:
            q = c.num_attention_heads * c.qk_head_dim
            yield name, mx.concatenate([rows(array, by_head), array[q:]])
        elif entry in ("self_attn.embed_q", "self_attn.unembed_out"):
            yield name, rows(array, heads)
        elif entry == "self_attn.o_proj":
            values = Range(heads.start * c.v_head_dim, heads.stop * c.v_head_dim)
            yield name, columns(array, values, c.num_attention_heads * c.v_head_dim)
        elif entry == "mlp.gate" and self._is_expert:
            yield name, array[: c.n_routed_experts]
        elif "shared_experts" in entry:
            yield name, self._of_shared(entry, array)
        elif entry == "mlp.gate_up_proj":
            yield from self._stack(name, array, halves)
        elif entry == "mlp.down_proj":
            yield from self._stack(name, array, lambda each, span: columns(each, span, self._width(array)))
        else:
            yield name, array

    @property
    def _is_expert(self) -> bool:
        return len(self.share.experts) < self.config.n_routed_experts

    def _width(self, array: mx.array) -> int:
        return self.config.intermediate_size if array.ndim == 2 else self.config.moe_intermediate_size

    def _stack(
        self, name: str, array: mx.array, cut: Callable[[mx.array, Range], mx.array]
    ) -> Iterator[tuple[str, mx.array]]:
        """Yield the share of gate and up, or of down; the last experts of a stack may be shared ones."""
        if array.ndim == 2:
            yield name, cut(array, self.share.dense_rows)
            return
        routed = self.config.n_routed_experts
        if not self._is_expert:
            yield name, cut(array, self.share.expert_rows)
            return
        yield name, rows(array, self.share.experts)
        if array.shape[0] > routed:
            yield f"mlp.shared_experts.{name.removeprefix('mlp.')}", self._unfused(name, array[routed:])

    def _unfused(self, name: str, array: mx.array) -> mx.array:
        """Return a rank's rows of shared experts, concatenated instead of stacked."""
        span = self.share.shared_rows
        if "down" in name:
            joined = mx.concatenate(list(array), axis=-1)
            return columns(joined, span, self.config.moe_intermediate_size * array.shape[0])
        gate, up = mx.split(array, 2, axis=1)
        return mx.concatenate([rows(part.reshape(-1, part.shape[-1]), span) for part in (gate, up)])

    def _of_shared(self, entry: str, array: mx.array) -> mx.array:
        span, c = self.share.shared_rows, self.config
        if entry.endswith("down_proj"):
            return columns(array, span, c.moe_intermediate_size * c.n_shared_experts)
        return rows(array, span) if ".parts." in entry else halves(array, span)


@pytest.mark.parametrize("size", [3, pytest.param(2, marks=pytest.mark.sweep), pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_ranks_parameters_are_its_share(strategy: str, size: int, folder: Path, whole: Arrays) -> None:
    _, placement = place_folder(folder, strategy + UNEVEN[size], size)
    for share in placement.shares:
        own = parameters(folder, share)
        expected = Expected(whole, load_config(folder), share).arrays()
        assert own.keys() == expected.keys()
        for name, array in expected.items():
            assert (own[name].dtype, own[name].shape, own[name].nbytes) == (array.dtype, array.shape, array.nbytes)
            assert mx.array_equal(own[name], array), name


def plans(checkpoint: Checkpoint, share: RankShare) -> Iterator[LayerPlan]:
    for layer in range(checkpoint.config.num_hidden_layers):
        yield plan_layer(checkpoint, layer, share)
    yield plan_top(checkpoint, share)


def count_elements(checkpoint: Checkpoint, share: RankShare) -> dict[str, np.ndarray]:
    """Return how often a rank copies each element of each tensor."""
    counts = {name: np.zeros(info.shape, np.uint8) for name, info in checkpoint.tensors.items()}
    for plan in plans(checkpoint, share):
        for _, array in plan.arrays():
            for copy in array.copies:
                part = copy.tensor_slice.view(counts[copy.field.tensors[0]])
                assert np.shares_memory(part, counts[copy.field.tensors[0]])
                part += 1
    return counts


@pytest.mark.parametrize("is_even", [True, False])
@pytest.mark.parametrize(
    "size",
    [1, 3, pytest.param(8, marks=pytest.mark.slow), *(pytest.param(size, marks=pytest.mark.sweep) for size in (2, 4))],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_shares_cover_every_tensor(strategy: str, size: int, is_even: bool, folder: Path) -> None:
    checkpoint, placement = place_folder(folder, strategy if is_even else strategy + UNEVEN[size], size)
    counts = [count_elements(checkpoint, share) for share in placement.shares]
    is_pipeline = placement.strategy.startswith("pipeline")
    divided = 0
    for name in checkpoint.tensors:
        each = [count[name] for count in counts]
        assert max(count.max() for count in each) == 1, name
        total = np.sum(each, axis=0)
        if is_pipeline:
            assert sorted(int(count.sum()) for count in each)[:-1] == [0] * (size - 1), name
        if all(count.all() for count in each):
            continue  # on every rank
        assert (total == 1).all(), name
        divided += 1
    assert (divided == 0) == (size == 1)
