"""The draft model as functions over a flat dict of parameters, and its loss with EAGLE-3's training-time test.

Parameter names are those of published EAGLE-3.1 checkpoints. kimi_mlx.model.draft_model has the formula of a row.
Shape letters: B rows of the batch, L tokens per row, C captured layers, D hidden, H heads, V draft_vocab_size.
Source: EAGLE-3 (https://arxiv.org/abs/2503.01840).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from scripts.mini.architecture import Shape, yarn_inverse_frequencies
from scripts.mini.draft_architecture import DRAFT_CONFIG, DRAFT_VOCAB_SIZE, LAYER_IDS
from scripts.mini.exponential import logsumexp, softmax
from scripts.mini.model import Parameters, rotate, swiglu

NUM_STEPS = 5
"""Number of tokens that are drafted one after the other in training."""

STEP_DECAY = 0.8
"""Weight of a later step's loss, relative to the step before."""

LAYER = "midlayer"
EPS: float = DRAFT_CONFIG["rms_norm_eps"]


def init_draft(shape: Shape, head: mx.array, seed: int) -> Parameters:
    """Return fresh float32 parameters.

    Args:
        shape: shape of kimi-mini.
        head: (V, D), rows of kimi-mini's head for tokens that can be drafted: initial values of the draft model's head.
        seed: seed of the random numbers.
    """
    mx.random.seed(seed)
    D, H, C, latent = shape.hidden_size, shape.num_attention_heads, len(LAYER_IDS), shape.kv_lora_rank
    attention, width = f"{LAYER}.self_attn", DRAFT_CONFIG["intermediate_size"]
    sizes = {
        "fc": (D, C * D),
        f"{attention}.q_a_proj": (shape.q_lora_rank, 2 * D),
        f"{attention}.q_b_proj": (H * (shape.qk_nope_head_dim + shape.qk_rope_head_dim), shape.q_lora_rank),
        f"{attention}.kv_a_proj_with_mqa": (latent + shape.qk_rope_head_dim, 2 * D),
        f"{attention}.kv_b_proj": (H * (shape.qk_nope_head_dim + shape.v_head_dim), latent),
        f"{attention}.o_proj": (D, H * shape.v_head_dim),
        f"{LAYER}.mlp.gate_proj": (width, D),
        f"{LAYER}.mlp.up_proj": (width, D),
        f"{LAYER}.mlp.down_proj": (D, width),
    }
    parameters = {
        f"{name}.weight": mx.random.normal(size, scale=0.7 * size[-1] ** -0.5) for name, size in sizes.items()
    }
    norms = {f"{LAYER}.{name}layernorm": D for name in ("input_", "post_attention_")}
    norms |= {f"{attention}.q_a_layernorm": shape.q_lora_rank, f"{attention}.kv_a_layernorm": latent}
    norms |= {f"{LAYER}.hidden_norm": D, "norm": D, **{f"fc_norm.{i}": D for i in range(C)}}
    parameters |= {f"{name}.weight": mx.ones((size,)) for name, size in norms.items()}
    return parameters | {"lm_head.weight": head}


def norm(p: Parameters, name: str, x: mx.array) -> mx.array:
    """RMSNorm with a named weight."""
    return mx.fast.rms_norm(x, p[f"{name}.weight"], EPS)


def fuse(p: Parameters, captured: mx.array) -> mx.array:
    """Return the first states: (B, L, C * D) -> (B, L, D)."""
    parts = mx.split(captured, len(LAYER_IDS), axis=-1)
    return mx.concatenate([norm(p, f"fc_norm.{i}", part) for i, part in enumerate(parts)], axis=-1) @ p["fc.weight"].T


def shift(x: mx.array, count: int, axis: int) -> mx.array:
    """Move rows to later positions; zeros come first."""
    if not count:
        return x
    zeros = list(x.shape)
    zeros[axis] = count
    kept = mx.take(x, mx.arange(x.shape[axis] - count), axis=axis)
    return mx.concatenate([mx.zeros(zeros, x.dtype), kept], axis=axis)


class Attention:
    """Latent attention of the steps of the training-time test.

    In a later step a row sees the rows of the first step whose positions the model had computed, and of each step
    since then one row: those are the rows that its cache has when it drafts.

    Args:
        p: parameters.
        segments: (B, L), numbers of the conversations; attention stays inside one.
        shape: shape of kimi-mini.
    """

    def __init__(self, p: Parameters, segments: mx.array, shape: Shape):
        self._p, self._segments, self._shape = p, segments, shape
        length = segments.shape[1]
        angles = mx.arange(length)[:, None] * mx.array(yarn_inverse_frequencies(shape.qk_rope_head_dim))
        self._rope = (mx.cos(angles), mx.sin(angles))
        self._distance = mx.arange(length)[:, None] - mx.arange(length)[None]
        self._is_same = segments[:, :, None] == segments[:, None, :]
        self._steps: list[tuple[mx.array, mx.array]] = []

    def __call__(self, x: mx.array) -> mx.array:
        """Attend in the next step: (B, L, 2 * D) -> (B, L, D)."""
        q, k, v = self._project(x)
        self._steps.append((k, v))
        step = len(self._steps) - 1
        mask = mx.where((self._distance >= step) & self._is_same, 0.0, -1e9)[:, None]
        logits, values = [q @ self._steps[0][0].swapaxes(-1, -2) + mask], []
        for number in range(1, step + 1):
            count = step - number
            is_inside = shift(self._segments + 1, count, axis=1) == self._segments + 1
            keys, moved = (shift(part, count, axis=2) for part in self._steps[number])
            logits.append((q * keys).sum(axis=-1, keepdims=True) + mx.where(is_inside, 0.0, -1e9)[:, None, :, None])
            values.append(moved)
        joined = mx.concatenate(logits, axis=-1)
        weights = softmax(joined, mx.stop_gradient(joined).max(axis=-1, keepdims=True))
        length = x.shape[1]
        out = weights[..., :length] @ self._steps[0][1]
        for column, moved in enumerate(values, length):
            out = out + weights[..., column, None] * moved
        return out.swapaxes(1, 2).reshape(*x.shape[:2], -1) @ self._p[f"{LAYER}.self_attn.o_proj.weight"].T

    def _project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return queries and keys (B, H, L, nope + rope), and values (B, H, L, V)."""
        p, shape, name = self._p, self._shape, f"{LAYER}.self_attn"
        B, L, _ = x.shape
        H, nope = shape.num_attention_heads, shape.qk_nope_head_dim
        q = norm(p, f"{name}.q_a_layernorm", x @ p[f"{name}.q_a_proj.weight"].T)
        q = (q @ p[f"{name}.q_b_proj.weight"].T).reshape(B, L, H, -1).swapaxes(1, 2)
        compressed = x @ p[f"{name}.kv_a_proj_with_mqa.weight"].T
        latent, k_rope = compressed[..., : shape.kv_lora_rank], compressed[..., shape.kv_lora_rank :]
        latent = norm(p, f"{name}.kv_a_layernorm", latent)
        kv = (latent @ p[f"{name}.kv_b_proj.weight"].T).reshape(B, L, H, -1).swapaxes(1, 2)
        k_rope = mx.broadcast_to(rotate(k_rope[:, None], *self._rope), (B, H, L, shape.qk_rope_head_dim))
        q = mx.concatenate([q[..., :nope], rotate(q[..., nope:], *self._rope)], axis=-1) * shape.attention_scale
        return q, mx.concatenate([kv[..., :nope], k_rope], axis=-1), kv[..., nope:]


def draft(p: Parameters, batch: Parameters, shape: Shape, num_steps: int) -> Iterator[mx.array]:
    """Yield the scores (B, L, V) of each step.

    In step s, row i predicts token i + 2 after s draft tokens, as if the model had computed positions 0 to i - s.

    Args:
        p: parameters.
        batch: captured (B, L, C * D); embeddings (B, L, D), of token i + 1 in row i; segments (B, L).
        shape: shape of kimi-mini.
        num_steps: number of steps.
    """
    embeddings = norm(p, f"{LAYER}.input_layernorm", batch["embeddings"])
    attention, states = Attention(p, batch["segments"], shape), fuse(p, batch["captured"])
    for step in range(num_steps):
        if step:
            states = shift(states, 1, axis=1)
        normed = norm(p, f"{LAYER}.hidden_norm", states)
        x = states + attention(mx.concatenate([embeddings, normed], axis=-1))
        x = x + swiglu(p, f"{LAYER}.mlp", norm(p, f"{LAYER}.post_attention_layernorm", x))
        states = norm(p, "norm", x)
        yield states @ p["lm_head.weight"].T


def loss(p: Parameters, batch: Parameters, shape: Shape, num_steps: int = NUM_STEPS) -> tuple[mx.array, mx.array]:
    """Return the loss, and the share of rows whose tokens are right in all steps up to each one (num_steps,).

    Args:
        p: parameters.
        batch: as for `draft`; scores (B, L, V), kimi-mini's logits of token i + 2 in row i; weights (B, L), 1 where
            that token belongs to an answer and can be drafted.
        shape: shape of kimi-mini.
        num_steps: number of steps.
    """
    targets = mx.softmax(batch["scores"], axis=-1)
    wanted = mx.argmax(batch["scores"], axis=-1)
    is_right = mx.ones(wanted.shape, mx.bool_)
    total, shares = mx.array(0.0), []
    for step, scores in enumerate(draft(p, batch, shape, num_steps)):
        # All draft tokens of a row belong to the answer of one dialogue.
        is_inside = shift(batch["segments"] + 1, step, axis=1) == batch["segments"] + 1
        weights = batch["weights"] * shift(batch["weights"], step, axis=1) * is_inside
        losses = logsumexp(scores.reshape(-1, DRAFT_VOCAB_SIZE)).reshape(weights.shape) - (targets * scores).sum(-1)
        count = mx.maximum(weights.sum(), 1)
        total = total + STEP_DECAY**step * (losses * weights).sum() / count
        is_right = (shift(is_right, 1, axis=1) if step else is_right) & (mx.argmax(scores, axis=-1) == wanted)
        shares.append((is_right * weights).sum() / count)
    return total, mx.stop_gradient(mx.stack(shares))


def tokens_per_step(shares: Any) -> float:
    """Return the mean number of tokens per step, including the model's own, from the shares of `loss`."""
    return 1.0 + float(mx.array(shares).sum())
