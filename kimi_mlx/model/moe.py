"""Mixture of experts with DeepSeek-V3's sigmoid router, and the dense MLP.

Letters: B batch, L length, D hidden_size, E n_routed_experts, S shared experts fused into the stack,
K experts per token, F rows of an expert on this rank.
Source: DeepSeek-V3 report (https://arxiv.org/abs/2412.19437), section 2.1.2, and its published routing code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.device import device_kind, elementwise
from kimi_mlx.model.device_traits import CPU_TUNING, weighs_activations
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Linear, Matrix, linear


@elementwise
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up."""
    return gate * mx.sigmoid(gate) * up


@elementwise
def router_scores(logits: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """Return sigmoid scores, and -(scores + bias), whose smallest values select the experts; all in float32."""
    scores = mx.sigmoid(logits)
    return scores, -(scores + bias)


Activation = Callable[[mx.array, mx.array], mx.array]
"""Function of gate and up."""


@cache
def ones(length: int, dtype: mx.Dtype) -> mx.array:
    """Return ones, (length,); cached, so that decode steps do not recompute them for each layer."""
    array = mx.ones((length,), dtype)
    mx.eval(array)
    return array


@cache
def grid_indices(*shape: int) -> mx.array:
    """Return 0, 1, 2, ... in a shape; cached, so that decode steps do not recompute it for each layer."""
    indices = mx.arange(math.prod(shape), dtype=mx.uint32).reshape(shape)
    mx.eval(indices)
    return indices


class DenseMLP(nn.Module):
    """SwiGLU with gate and up in one matrix. Also used for shared experts that are quantized differently."""

    def __init__(self, weights: LayerWeights, path: str):
        super().__init__()
        self.gate_up_proj = linear(weights.matrices(f"{path}.gate_up_proj"))
        self.down_proj = Linear(weights.matrix(f"{path}.down_proj"))

    def __call__(self, x: mx.array, residual: mx.array | None) -> mx.array:
        """(B, L, D) -> (B, L, D), added to the residual if given."""
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        out = self.down_proj(swiglu(gate, up))
        return out if residual is None else residual + out


class Router(nn.Module):
    """Top-K router, in float32 as published: in bfloat16 near ties choose other experts.

    The S shared experts are appended as experts that always win, with weight 1.
    Their rows of the weight are zero and their `offset` is -inf, so their score is 0 and does not change the
    normalization. Their correction bias is +inf, so they are always selected.
    """

    def __init__(self, config: ModelConfig, weights: LayerWeights):
        super().__init__()
        shared = weights.num_fused_shared
        self.num_routed = config.n_routed_experts
        self.num_chosen = config.num_experts_per_tok + shared
        self.n_group, self.topk_group = config.n_group, config.topk_group
        weight = weights.array("mlp.gate").astype(mx.float32)
        bias = weights.array("mlp.gate.e_score_correction_bias").astype(mx.float32)
        self.weight = mx.pad(weight, [(0, shared), (0, 0)])
        self.offset = mx.pad(mx.zeros((self.num_routed,)), (0, shared), constant_values=mx.array(-mx.inf))
        self.e_score_correction_bias = mx.pad(bias, (0, shared), constant_values=mx.array(mx.inf))
        dtype = weights.array("input_layernorm").dtype
        self._weigh = elementwise(self._weigh_with_constants(config, dtype))
        self._weighted_swiglu = elementwise(self._swiglu_with_constants(config, dtype))

    def _weigh_with_constants(self, config: ModelConfig, dtype: mx.Dtype) -> Callable[..., mx.array]:
        scale, num_routed = config.routed_scaling_factor, self.num_routed
        is_normed = config.norm_topk_prob and config.num_experts_per_tok > 1

        def weigh(ids: mx.array, scores: mx.array, total: mx.array) -> mx.array:
            weights = scores * scale / (total + 1e-20) if is_normed else scores * scale
            return mx.where(ids < num_routed, weights, mx.array(1.0)).astype(dtype)

        return weigh

    def _swiglu_with_constants(self, config: ModelConfig, dtype: mx.Dtype) -> Callable[..., mx.array]:
        weigh = self._weigh_with_constants(config, mx.float32)

        def weighted_swiglu(
            gate: mx.array, up: mx.array, ids: mx.array, scores: mx.array, *parts: mx.array
        ) -> mx.array:
            totals = list(parts)
            while len(totals) > 1:  # in pairs: mx.compile fuses a limited depth
                totals = [sum(totals[i + 1 : i + 2], totals[i]) for i in range(0, len(totals), 2)]
            return (swiglu(gate, up) * weigh(ids, scores, totals[0])).astype(dtype)

        return weighted_swiglu

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Route x: (B, L, D).

        Returns:
            ids (B, L, K + S) uint32 and scores (B, L, K + S) float32, from which `weigh` computes the weights.
        """
        logits = mx.addmm(self["offset"], x.astype(mx.float32), self["weight"].swapaxes(-1, -2))
        scores, order = router_scores(logits, self["e_score_correction_bias"])
        if self.n_group > 1:
            order = self._keep_best_groups(order)
        ids = mx.argpartition(order, kth=self.num_chosen - 1, axis=-1)[..., : self.num_chosen]
        return ids, mx.take_along_axis(scores, ids, axis=-1)

    def weigh(self, ids: mx.array, scores: mx.array) -> mx.array:
        """Return the weights of the chosen experts, (B, L, K + S) in the compute dtype."""
        return self._weigh(ids, scores, scores.sum(axis=-1, keepdims=True))

    def weighted_swiglu(self, gate: mx.array, up: mx.array, ids: mx.array, scores: mx.array) -> mx.array:
        """Return silu(gate) * up * weight, (B, L, K + S, 1, F): one kernel on a GPU, the sum of the scores included."""
        scores = scores[..., None, None]  # (B, L, K + S, 1, 1)
        return self._weighted_swiglu(
            gate, up, ids[..., None, None], scores, *mx.split(scores, self.num_chosen, axis=-3)
        )

    def weighted_swiglu_of_pairs(
        self, gate: mx.array, up: mx.array, ids: mx.array, scores: mx.array, all_scores: mx.array
    ) -> mx.array:
        """Return the same as weighted_swiglu for n (token, expert) pairs, (n, 1, F).

        Args:
            gate: (n, 1, F).
            up: (n, 1, F).
            ids: experts, (n,).
            scores: their scores, (n,).
            all_scores: scores of all experts of each pair's token, (n, K + S).
        """
        parts = mx.split(all_scores[..., None], self.num_chosen, axis=-2)  # (n, 1, 1) each
        return self._weighted_swiglu(gate, up, ids[:, None, None], scores[:, None, None], *parts)

    def _keep_best_groups(self, order: mx.array) -> mx.array:
        """Exclude experts outside the topk_group groups with the highest sum of their two best experts."""
        routed, shared = order[..., : self.num_routed], order[..., self.num_routed :]
        groups = routed.reshape(*routed.shape[:-1], self.n_group, -1)
        best_two = -mx.topk(-groups, 2, axis=-1).sum(axis=-1)  # (B, L, n_group), smaller is better
        excluded = mx.argpartition(best_two, kth=self.topk_group - 1, axis=-1)[..., self.topk_group :]
        groups = mx.put_along_axis(groups, excluded[..., None], mx.array(mx.inf), axis=-2)
        return mx.concatenate([groups.reshape(routed.shape), shared], axis=-1)


class MoE(nn.Module):
    """Routed and shared experts of one layer; on several ranks, this rank's partial sum.

    A rank holds some rows of every expert, or all rows of some experts (`_held`).
    """

    sort_min_choices = CPU_TUNING.sort_min_choices
    """Minimum number of (token, expert) pairs that are sorted; set by Model.tune."""

    def __init__(self, config: ModelConfig, weights: LayerWeights):
        super().__init__()
        self.gate = Router(config, weights)
        self.num_experts = self._add_experts(weights)
        num_held = self.num_experts - weights.num_fused_shared
        self._held = None
        if num_held < config.n_routed_experts:
            self._held = (weights.first_expert, weights.first_expert + num_held)
        if weights.has("mlp.shared_experts.down_proj"):
            self.shared_experts = DenseMLP(weights, "mlp.shared_experts")

    def _add_experts(self, weights: LayerWeights) -> int:
        """Add the stacks of the experts on this rank; return their number, the S shared ones included."""
        self.gate_up_proj = linear(weights.matrices("mlp.experts.gate_up_proj"))
        self.down_proj = Matrix(weights.matrix("mlp.experts.down_proj"))
        return self.down_proj.weight.shape[0]

    @property
    def expert_rows(self) -> int:
        """Number of rows of each expert on this rank, F."""
        return self.down_proj.columns

    @property
    def down_proj_bytes(self) -> int:
        """Bytes of the down projections of all experts on this rank."""
        return sum(cast(mx.array, array).nbytes for array in self.down_proj.parameters().values())

    def __call__(self, x: mx.array, residual: mx.array | None, ids: mx.array, scores: mx.array) -> mx.array:
        """(B, L, D) -> (B, L, D), added to the residual if given.

        Args:
            x: hidden states.
            residual: array to add, if any.
            ids: chosen experts from `gate`, (B, L, K + S).
            scores: their scores.
        """
        if "shared_experts" in self:
            residual = self.shared_experts(x, residual)
        if self._held is not None:
            return self._held_experts(x, ids, self.gate.weigh(ids, scores), residual)
        if ids.size >= self.sort_min_choices:
            outputs, weights = self._sorted_experts(x, ids), self.gate.weigh(ids, scores)
        elif weighs_activations(device_kind()):
            outputs = self._experts(x, ids, lambda gate, up: self.gate.weighted_swiglu(gate, up, ids, scores))
            weights = ones(ids.shape[-1], outputs.dtype)
        else:
            outputs, weights = self._experts(x, ids), self.gate.weigh(ids, scores)
        return self._weighted_sum(outputs, weights, residual)

    def _weighted_sum(self, outputs: mx.array, weights: mx.array, residual: mx.array | None) -> mx.array:
        """Sum the outputs of each token's experts: (B, L, K + S, D), (..., K + S) -> (B, L, D)."""
        weights = weights[..., None, :]  # (B, L, 1, K + S)
        if residual is None:
            return (weights @ outputs).squeeze(-2)
        return mx.addmm(residual[..., None, :], weights, outputs).squeeze(-2)

    def _held_experts(self, x: mx.array, ids: mx.array, weights: mx.array, residual: mx.array | None) -> mx.array:
        """Run only the chosen experts that this rank holds.

        Building the graph requires their number, so this waits for the router.
        """
        first, _ = cast(tuple[int, int], self._held)
        chosen = np.array(ids).reshape(-1)
        choices = self._held_choices(chosen)
        outputs = None
        if choices.size:
            inputs = x.reshape(-1, x.shape[-1])[mx.array(choices // ids.shape[-1])]
            outputs = self._run(inputs[:, None], mx.array(chosen[choices] - first)).squeeze(-2)  # (choices, D)
        return self._add_held(x, residual, weights, choices, outputs)

    def _held_choices(self, chosen: np.ndarray) -> np.ndarray:
        """Return the positions in `chosen` of the experts that this rank holds, in the order of the experts, uint32."""
        first, end = cast(tuple[int, int], self._held)
        choices = np.flatnonzero((chosen >= first) & (chosen < end))
        return choices[np.argsort(chosen[choices], kind="stable")].astype(np.uint32)

    def _add_held(
        self,
        x: mx.array,
        residual: mx.array | None,
        weights: mx.array,
        choices: np.ndarray,
        outputs: mx.array | None,
    ) -> mx.array:
        """Add the weighted outputs (choices, D) of held experts to the residual, or to zeros like x."""
        out = mx.zeros_like(x) if residual is None else residual
        if outputs is None:
            return out
        tokens = mx.array(choices // weights.shape[-1])
        outputs = outputs * weights.reshape(-1, 1)[mx.array(choices)]
        return out.reshape(-1, x.shape[-1]).at[tokens].add(outputs).reshape(x.shape)

    def _experts(self, x: mx.array, ids: mx.array, activate: Activation | None = None) -> mx.array:
        """Run each token through its experts: (B, L, D), (B, L, K) -> (B, L, K, D)."""
        tokens, choices = grid_indices(*ids.shape[:-1], 1), grid_indices(*ids.shape)
        return self._run(x[..., None, None, :], ids, tokens, choices, activate).squeeze(-2)

    def _sorted_experts(self, x: mx.array, ids: mx.array) -> mx.array:
        """Return the same as _experts for many tokens, reading each expert once."""
        flat = ids.flatten()
        order = mx.argsort(flat)
        tokens = x.reshape(-1, x.shape[-1])[order // ids.shape[-1]]
        outputs = self._run(tokens[:, None], flat[order]).squeeze(-2)
        return outputs[mx.argsort(order)].reshape(*ids.shape, -1)

    def _run(
        self,
        x: mx.array,
        ids: mx.array,
        tokens: mx.array | None = None,
        choices: mx.array | None = None,
        activate: Activation | None = None,
    ) -> mx.array:
        """Run x through the experts `ids`, which must ascend if no positions are given.

        Args:
            x: (..., 1, D).
            ids: indices of the experts.
            tokens: position in x of the input of each id; None if x has one row for each id.
            choices: position of each id.
            activate: function of gate and up, (..., 1, F) each; None for swiglu.
        """
        fused = self.gate_up_proj.gather_matmul(x, ids, tokens)
        gate, up = mx.split(fused, 2, axis=-1)
        return self.down_proj.gather_matmul((activate or swiglu)(gate, up), ids, choices)
