"""MuonClip: Muon for the matrices of the layers, AdamW for the rest, QK-clip after each step.

Sources: Moonshot AI, "Muon is Scalable for LLM Training" (update times
0.2 sqrt(max(rows, columns)): as large as AdamW's, so that both share learning rate and weight decay);
the Kimi K2 report (QK-clip).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import mlx.core as mx
from mlx.optimizers import Muon

from scripts.mini.architecture import Shape
from scripts.mini.model import Parameters

BETA_1, BETA_2, EPSILON = 0.9, 0.95, 1e-8
MOMENTUM = 0.95
WEIGHT_DECAY = 0.1
QK_CLIP_THRESHOLD = 60.0
BIAS_STEP = 0.002  # step of the router's correction bias, by DeepSeek's sign rule
MUON_PREFIXES = ("model.layers.", "vision_tower.encoder.")


def is_trained(name: str) -> bool:
    """Return whether a parameter has a gradient; the routers' correction bias has its own rule."""
    return not name.endswith("e_score_correction_bias")


def is_muon_matrix(name: str, value: mx.array) -> bool:
    """Return whether Muon updates it: matrices inside layers, also stacked; not embedding, head or routers."""
    return value.ndim >= 2 and name.startswith(MUON_PREFIXES) and not name.endswith("mlp.gate.weight")


def _matrix_shape(name: str, value: mx.array) -> tuple[int, int]:
    """Return the shape of a parameter's matrices: `wqkv` is three of them."""
    rows, columns = value.shape[-2:]
    return (rows // 3 if name.endswith("wqkv.weight") else rows), columns


class MuonClip:
    """The optimizer's state and step. `use_muon=False` makes it AdamW throughout."""

    def __init__(self, parameters: Parameters, use_muon: bool = True, group: mx.distributed.Group | None = None):
        self._group = group or mx.distributed.init()
        self._newton_schulz = Muon(learning_rate=1.0)._zeropower_via_newtonschulz5
        trained = {name: value for name, value in parameters.items() if is_trained(name)}
        self._muon = [name for name, value in trained.items() if use_muon and is_muon_matrix(name, value)]
        self._adam = [name for name in trained if name not in set(self._muon)]
        self.state: Parameters = {f"{name}:m": mx.zeros_like(trained[name]) for name in trained}
        self.state |= {f"{name}:v": mx.zeros_like(trained[name]) for name in self._adam}

    def step(self, parameters: Parameters, gradients: Parameters, learning_rate: float, step: int) -> Parameters:
        """Return the new parameters; step counts from 1. Parameters without a gradient stay as they are."""
        new = dict(parameters)
        self._step_adam(new, gradients, learning_rate, step)
        self._step_muon(new, gradients, learning_rate)
        return new

    def _step_adam(self, parameters: Parameters, gradients: Parameters, learning_rate: float, step: int) -> None:
        for name in self._adam:
            if name not in gradients:
                continue
            gradient = gradients[name]
            m = BETA_1 * self.state[f"{name}:m"] + (1 - BETA_1) * gradient
            v = BETA_2 * self.state[f"{name}:v"] + (1 - BETA_2) * gradient * gradient
            self.state[f"{name}:m"], self.state[f"{name}:v"] = m, v
            update = (m / (1 - BETA_1**step)) / (mx.sqrt(v / (1 - BETA_2**step)) + EPSILON)
            decay = WEIGHT_DECAY if is_muon_matrix(name, gradient) else 0.0
            parameters[name] = parameters[name] * (1 - learning_rate * decay) - learning_rate * update

    def _step_muon(self, parameters: Parameters, gradients: Parameters, learning_rate: float) -> None:
        by_shape: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
        for name in self._muon:
            if name in gradients:
                by_shape[_matrix_shape(name, gradients[name])].append(name)
        for (rows, columns), names in by_shape.items():
            directions = [self._momentum(name, gradients[name]).reshape(-1, rows, columns) for name in names]
            updates = self._orthogonalize(mx.concatenate(directions)) * (0.2 * max(rows, columns) ** 0.5)
            start = 0
            for name, direction in zip(names, directions, strict=True):
                update = updates[start : start + direction.shape[0]].reshape(gradients[name].shape)
                start += direction.shape[0]
                parameters[name] = parameters[name] * (1 - learning_rate * WEIGHT_DECAY) - learning_rate * update

    def _orthogonalize(self, matrices: mx.array) -> mx.array:
        """Orthogonalize a stack (N, rows, columns) by Newton-Schulz; each rank computes its share, then all-gather."""
        count, size, rank = matrices.shape[0], self._group.size(), self._group.rank()
        share = -(-count // size)
        padding = mx.ones((share * size - count, *matrices.shape[1:]))
        own = mx.concatenate([matrices, padding])[rank * share : (rank + 1) * share]
        own = mx.vmap(lambda x: self._newton_schulz(x, steps=5))(own)
        return mx.distributed.all_gather(own, group=self._group)[:count]

    def _momentum(self, name: str, gradient: mx.array) -> mx.array:
        m = MOMENTUM * self.state[f"{name}:m"] + (1 - MOMENTUM) * gradient
        self.state[f"{name}:m"] = m
        return MOMENTUM * m + (1 - MOMENTUM) * gradient  # Nesterov


def qk_clip(parameters: Parameters, largest: mx.array, shape: Shape) -> list[str]:
    """Shrink the query and key projections of heads with a logit above the threshold, in place.

    Args:
        parameters: parameters of the model, changed for these heads.
        largest: largest attention logit per head (layers, H).
        shape: shape of the model.

    Returns: the heads that were clipped, as "layer.head".
    """
    clipped: list[str] = []
    nope = shape.qk_nope_head_dim
    rows: Any = largest.tolist()
    for layer, logits in enumerate(rows):
        if max(logits) <= QK_CLIP_THRESHOLD:
            continue
        factors = mx.array([min(1.0, QK_CLIP_THRESHOLD / max(logit, 1e-6)) for logit in logits])[:, None, None]
        attention = f"model.layers.{layer}.self_attn"
        queries = parameters[f"{attention}.q_b_proj.weight"]
        heads = queries.reshape(len(logits), -1, queries.shape[-1])
        # Each head has its own latent key, so query and key share the factor. The rope key is common to all heads.
        heads = mx.concatenate([heads[:, :nope] * mx.sqrt(factors), heads[:, nope:] * factors], axis=1)
        parameters[f"{attention}.q_b_proj.weight"] = heads.reshape(queries.shape)
        parameters[f"{attention}.embed_q.weight"] = parameters[f"{attention}.embed_q.weight"] * mx.sqrt(factors)
        clipped += [f"{layer}.{head}" for head, logit in enumerate(logits) if logit > QK_CLIP_THRESHOLD]
    return clipped


def balance_experts(parameters: Parameters, loads: mx.array, shape: Shape) -> None:
    """Raise the bias of experts below their share of tokens, and lower that of the others. loads: (layers, E)."""
    for row, layer in enumerate(range(shape.first_k_dense_replace, shape.num_hidden_layers)):
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        parameters[name] = parameters[name] + BIAS_STEP * mx.sign(loads[row].mean() - loads[row])
