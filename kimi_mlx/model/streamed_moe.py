"""Mixture of experts that reads routed experts from disk when they are not in memory.

The outputs have the same bits as those of kimi_mlx.model.moe. The same kernel computes each (token, expert) pair, only
together with other pairs and with the expert at another index. Then the outputs are put in the same order and summed in
the same way.

Letters: as in kimi_mlx.model.moe; N tokens, n pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.device import device_kind
from kimi_mlx.model.device_traits import weighs_activations
from kimi_mlx.model.expert_slots import Launch
from kimi_mlx.model.expert_streamer import ExpertStreamer, Wave
from kimi_mlx.model.moe import MoE, ones, swiglu
from kimi_mlx.model.tree import LayerWeights

GROUPED_MIN_PAIRS, GROUPED_MIN_PER_EXPERT = 16, 4
"""Metal computes sorted pairs with a kernel for groups if there are at least this many pairs, and this many for each
expert of the stack. Source: GatherQMM::eval_gpu in quantized.cpp of MLX's Metal backend (0.32)."""

FEW_TOKENS = 16
"""Up to this many tokens, the likeliest experts of the next layer are prefetched first; beyond, in ascending order."""


@dataclass(frozen=True)
class Pairs:
    """The (token, expert) pairs of a step that this rank computes.

    Args:
        positions: positions of the pairs in the flattened ids, uint32 (n,).
        experts: expert of each pair, numbered from the first on this rank, (n,).
        width: number of pairs of each token, K + S.
        num_routed: number of routed experts on this rank; shared ones follow.
    """

    positions: np.ndarray
    experts: np.ndarray
    width: int
    num_routed: int

    def routed(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the routed experts of the pairs, ascending, and the number of pairs of each."""
        counts = np.bincount(self.experts, minlength=self.num_routed)[: self.num_routed]
        needed = np.flatnonzero(counts)
        return needed, counts[needed]


class StreamedMoE(MoE):
    """Routed and shared experts of one layer; some routed ones are only on disk.

    Args:
        config: dimensions of the model.
        weights: weights of the layer; the stacks of experts have only the fused shared ones.
        streamer: the routed experts of all layers.
        layer: number of the layer.
    """

    guess: Callable[[mx.array], tuple[mx.array, mx.array]] | None = None
    """Router of the next layer with routed experts on this rank, to guess its choices; None after the last layer. The
    model sets it.

    Given the input of this layer's router, it predicts 66 % of the experts that it chooses later (kimi-mini, 3,000
    characters of the README); given the states before this layer's norm, with its own norm, 64 %; chance is 31 %."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, streamer: ExpertStreamer, layer: int):
        assert weights.routed is not None
        self._format, self._first = weights.routed.format, weights.first_expert
        self._num_routed = weights.routed.num_experts
        shared = [
            array
            for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
            for part in (weights.matrices(name) if weights.has(name) else ())
            for array in part.arrays
        ]
        self._streamer, self._experts_of_layer = streamer, streamer.add_layer(layer, shared)
        super().__init__(config, weights)

    def _add_experts(self, weights: LayerWeights) -> int:
        stack = self._experts_of_layer.stack
        if stack is not None:
            self.gate_up_proj, self.down_proj = stack.gate_up_proj, stack.down_proj
        return self._num_routed + weights.num_fused_shared

    @property
    def expert_rows(self) -> int:
        """Number of rows of each expert on this rank, F."""
        return self._format.down.columns

    @property
    def down_proj_bytes(self) -> int:
        """Bytes of the down projections of all experts on this rank, in memory or not."""
        return self.num_experts * self._format.down.num_bytes

    @property
    def is_quantized(self) -> bool:
        """Whether the routed experts are quantized."""
        return self._format.down.quantization is not None

    def stream(self, x: mx.array, residual: mx.array | None, ids: mx.array, scores: mx.array) -> mx.array:
        """Return the same as MoE.__call__. Waits for the router and for reads.

        Args:
            x: hidden states, (B, L, D).
            residual: array to add, if any.
            ids: chosen experts, (B, L, K + S).
            scores: their scores.
        """
        pairs, guess = self._wait_for_router(x, ids)
        if "shared_experts" in self:
            residual = self.shared_experts(x, residual)
            mx.async_eval(residual)
        is_sorted = self._is_sorted(pairs, ids)
        is_weighed = self._held is None and not is_sorted and weighs_activations(device_kind())
        rows = _Rows(self, x, ids, scores, pairs, is_sorted, is_weighed)
        needed, counts = pairs.routed()
        num_tokens = ids.size // pairs.width
        for wave in self._streamer.waves(self._experts_of_layer, needed, counts, num_tokens, guess):
            wave.launch = rows.compute(wave)
        outputs = rows.outputs()
        weights = None if is_weighed else self.gate.weigh(ids, scores)
        if self._held is not None:
            assert weights is not None
            return self._add_held(x, residual, weights, pairs.positions, outputs)
        assert outputs is not None
        outputs = outputs.reshape(*ids.shape, -1)  # (B, L, K + S, D)
        weights = ones(pairs.width, outputs.dtype) if weights is None else weights
        return self._weighted_sum(outputs, weights, residual)

    def _wait_for_router(self, x: mx.array, ids: mx.array) -> tuple[Pairs, np.ndarray]:
        """Return the pairs of a step and the guess for the next layer: the only wait for the device in a layer."""
        following = self._streamer.next_layer(self._experts_of_layer)
        guess = []
        if self.guess is not None and following is not None and following.num_kept < following.num_experts:
            guess = list(self.guess(x))
        mx.eval(ids, *guess, *self._streamer.markers())
        width, chosen = ids.shape[-1], np.array(ids).reshape(-1)
        if self._held is None:
            pairs = Pairs(np.arange(ids.size, dtype=np.uint32), chosen.astype(np.int64), width, self._num_routed)
        else:
            positions = self._held_choices(chosen)
            pairs = Pairs(positions, chosen[positions].astype(np.int64) - self._first, width, self._num_routed)
        likely = self._likely_experts(*map(np.array, guess)) if guess else np.zeros((0,), np.int64)
        return pairs, likely

    def _likely_experts(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return the guessed experts that are on this rank, without duplicates."""
        experts = ids.reshape(-1).astype(np.int64) - self._first
        is_here = (experts >= 0) & (experts < self._num_routed)
        if ids.size > FEW_TOKENS * ids.shape[-1]:
            return np.unique(experts[is_here])
        order = np.argsort(-scores.reshape(-1)[is_here], kind="stable")
        return np.array(list(dict.fromkeys(experts[is_here][order].tolist())), np.int64)

    def _is_sorted(self, pairs: Pairs, ids: mx.array) -> bool:
        """Return whether MoE computes the pairs sorted by expert, which takes another kernel on a GPU."""
        num_pairs = len(pairs.positions)
        if self._held is None and ids.size < self.sort_min_choices:
            return False
        if not self.is_quantized:
            return True
        return num_pairs >= GROUPED_MIN_PAIRS and num_pairs // self.num_experts >= GROUPED_MIN_PER_EXPERT


class _Rows:
    """Computes the pairs of a step, wave by wave.

    Args:
        moe: the layer's experts.
        x: hidden states, (B, L, D).
        ids: chosen experts, (B, L, K + S).
        scores: their scores.
        pairs: pairs to compute.
        is_sorted: whether the pairs of a wave are sorted by expert.
        is_weighed: whether the router's weights are applied to the activations.
    """

    def __init__(
        self,
        moe: StreamedMoE,
        x: mx.array,
        ids: mx.array,
        scores: mx.array,
        pairs: Pairs,
        is_sorted: bool,
        is_weighed: bool,
    ):
        self._moe, self._pairs, self._is_sorted, self._is_weighed = moe, pairs, is_sorted, is_weighed
        self._x = x.reshape(-1, 1, x.shape[-1])  # (N, 1, D)
        self._ids, self._scores = ids.reshape(-1, pairs.width), scores.reshape(-1, pairs.width)
        self._parts: list[mx.array] = []
        self._order: list[np.ndarray] = []

    def compute(self, wave: Wave) -> Launch:
        """Launch the pairs of a wave."""
        index = np.full(self._moe.num_experts, -1)
        index[list(wave.slots)] = list(wave.slots.values())
        slots = index[self._pairs.experts]
        rows = np.flatnonzero(slots >= 0)
        slots = slots[rows].astype(np.uint32)
        if self._is_sorted:
            order = np.argsort(slots.astype(np.uint16), kind="stable")
            rows, slots = rows[order], slots[order]
        run = self._run_sorted if self._is_sorted else self._run
        part = run(wave, self._pairs.positions[rows], slots)
        self._parts.append(part)
        self._order.append(rows)
        return Launch(part)

    def outputs(self) -> mx.array | None:
        """Return the outputs of all pairs in their order, (n, D); None if there are no pairs."""
        if not self._parts:
            return None
        order = self._order[0] if len(self._order) == 1 else np.concatenate(self._order)
        outputs = self._parts[0] if len(self._parts) == 1 else mx.concatenate(self._parts)
        if (order[1:] > order[:-1]).all():
            return outputs
        inverse = np.empty(len(order), np.uint32)
        inverse[order] = np.arange(len(order), dtype=np.uint32)
        return outputs[mx.array(inverse)]

    def _run(self, wave: Wave, positions: np.ndarray, slots: np.ndarray) -> mx.array:
        """Return the outputs of pairs in any order, (n, D)."""
        tokens, indices = mx.array(positions // self._pairs.width), mx.array(slots)
        fused = wave.stack.gate_up_proj.gather_matmul(self._x, indices, tokens)  # (n, 1, 2F)
        gate, up = mx.split(fused, 2, axis=-1)
        activated = self._weighed(gate, up, positions, tokens) if self._is_weighed else swiglu(gate, up)
        rows = mx.arange(len(slots), dtype=mx.uint32)
        return wave.stack.down_proj.gather_matmul(activated, indices, rows).squeeze(-2)

    def _weighed(self, gate: mx.array, up: mx.array, positions: np.ndarray, tokens: mx.array) -> mx.array:
        chosen = mx.array(positions)
        ids, scores = self._ids.reshape(-1)[chosen], self._scores.reshape(-1)[chosen]
        return self._moe.gate.weighted_swiglu_of_pairs(gate, up, ids, scores, self._scores[tokens])

    def _run_sorted(self, wave: Wave, positions: np.ndarray, slots: np.ndarray) -> mx.array:
        """Return the outputs of pairs that are sorted by slot, (n, D).

        The last pair is repeated until there are enough pairs for the kernel for groups.
        """
        count = len(slots)
        padded = max(count, GROUPED_MIN_PAIRS, GROUPED_MIN_PER_EXPERT * wave.stack.num_slots)
        if padded > count and device_kind() != "cpu" and self._moe.is_quantized:
            positions, slots = (np.pad(values, (0, padded - count), mode="edge") for values in (positions, slots))
        indices = mx.array(slots)
        fused = wave.stack.gate_up_proj.gather_matmul(self._x[mx.array(positions // self._pairs.width)], indices)
        gate, up = mx.split(fused, 2, axis=-1)
        return wave.stack.down_proj.gather_matmul(swiglu(gate, up), indices)[:count].squeeze(-2)
