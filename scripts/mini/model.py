"""The training model: DeepSeek-V3's layers as functions over a flat dict of parameters.

Parameter names are those of mlx-lm's `deepseek_v3`, so a checkpoint is the dict itself, quantized.
Shape letters: B rows, L tokens per row, T = B * L, D hidden, H heads, E experts, C slots of an expert,
F expert width, M supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from scripts.mini.architecture import Shape, yarn_inverse_frequencies
from scripts.mini.exponential import logsumexp, sigmoid, softmax, with_gradient

Parameters = dict[str, mx.array]
CAPACITY = 1.3  # maximum multiple of its fair share of tokens that an expert processes; the rest skip it


def init_parameters(shape: Shape, seed: int) -> Parameters:
    """Return fresh float32 parameters: normal, 0.7 / sqrt(fan in) for matrices, less where they add to the stream."""
    mx.random.seed(seed)
    parameters: Parameters = {}

    def matrix(name: str, *dims: int, scale: float | None = None) -> None:
        std = dims[-1] ** -0.5 * 0.7 if scale is None else scale
        parameters[f"{name}.weight"] = mx.random.normal(dims, scale=std)

    D, H = shape.hidden_size, shape.num_attention_heads
    matrix("model.embed_tokens", shape.vocab_size, D, scale=0.5)
    matrix("lm_head", shape.vocab_size, D, scale=0.02)
    parameters["model.norm.weight"] = mx.ones((D,))
    depth_scale = (2 * shape.num_hidden_layers) ** -0.5
    for index in range(shape.num_hidden_layers):
        layer, attention = f"model.layers.{index}", f"model.layers.{index}.self_attn"
        for norm, width in (
            (f"{layer}.input_layernorm", D),
            (f"{layer}.post_attention_layernorm", D),
            (f"{attention}.q_a_layernorm", shape.q_lora_rank),
            (f"{attention}.kv_a_layernorm", shape.kv_lora_rank),
        ):
            parameters[f"{norm}.weight"] = mx.ones((width,))
        matrix(f"{attention}.q_a_proj", shape.q_lora_rank, D)
        matrix(f"{attention}.q_b_proj", H * (shape.qk_nope_head_dim + shape.qk_rope_head_dim), shape.q_lora_rank)
        matrix(f"{attention}.kv_a_proj_with_mqa", shape.kv_lora_rank + shape.qk_rope_head_dim, D)
        latent = shape.kv_lora_rank
        matrix(f"{attention}.embed_q", H, latent, shape.qk_nope_head_dim, scale=latent**-0.5)
        matrix(f"{attention}.unembed_out", H, shape.v_head_dim, latent)
        width = H * shape.v_head_dim
        matrix(f"{attention}.o_proj", D, width, scale=width**-0.5 * depth_scale)
        _init_feed_forward(shape, index, matrix, parameters, depth_scale)
    return parameters


def _init_feed_forward(
    shape: Shape, index: int, matrix: Callable[..., None], parameters: Parameters, depth_scale: float
) -> None:
    mlp, D = f"model.layers.{index}.mlp", shape.hidden_size
    F, E = shape.moe_intermediate_size, shape.n_routed_experts
    if index < shape.first_k_dense_replace:
        blocks: list[tuple[str, tuple[int, ...], int]] = [(mlp, (), shape.intermediate_size)]
    else:
        blocks = [(f"{mlp}.shared_experts", (), F), (f"{mlp}.switch_mlp", (E,), F)]
        matrix(f"{mlp}.gate", E, D)
        parameters[f"{mlp}.gate.e_score_correction_bias"] = mx.zeros((E,))
    for name, experts, width in blocks:
        matrix(f"{name}.gate_proj", *experts, width, D)
        matrix(f"{name}.up_proj", *experts, width, D)
        matrix(f"{name}.down_proj", *experts, D, width, scale=width**-0.5 * depth_scale)


def rotate(x: mx.array, cosine: mx.array, sine: mx.array) -> mx.array:
    """Rotate adjacent pairs; x: (..., L, dims), cosine and sine: (L, dims / 2)."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = mx.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    return turned.reshape(x.shape)


def attention(p: Parameters, name: str, x: mx.array, mask: mx.array, rope: tuple[mx.array, mx.array], shape: Shape):
    """Latent attention, not absorbed: the output (B, L, D), and the largest logit of each head (H,)."""
    B, L, _ = x.shape
    H, nope = shape.num_attention_heads, shape.qk_nope_head_dim
    q = mx.fast.rms_norm(x @ p[f"{name}.q_a_proj.weight"].T, p[f"{name}.q_a_layernorm.weight"], 1e-6)
    q = (q @ p[f"{name}.q_b_proj.weight"].T).reshape(B, L, H, -1).swapaxes(1, 2)  # (B, H, L, nope + rope)
    compressed = x @ p[f"{name}.kv_a_proj_with_mqa.weight"].T
    latent, k_rope = compressed[..., : shape.kv_lora_rank], compressed[..., shape.kv_lora_rank :]
    latent = mx.fast.rms_norm(latent, p[f"{name}.kv_a_layernorm.weight"], 1e-6)
    to_k = p[f"{name}.embed_q.weight"].swapaxes(0, 1).reshape(shape.kv_lora_rank, -1)  # (kv_lora, H * nope)
    to_v = p[f"{name}.unembed_out.weight"].reshape(-1, shape.kv_lora_rank)  # (H * v, kv_lora)
    k_nope = (latent @ to_k).reshape(B, L, H, nope).swapaxes(1, 2)
    v = (latent @ to_v.T).reshape(B, L, H, -1).swapaxes(1, 2)
    q_rope = rotate(q[..., nope:], *rope)
    k_rope = mx.broadcast_to(rotate(k_rope[:, None], *rope), (B, H, L, shape.qk_rope_head_dim))
    q = mx.concatenate([q[..., :nope], q_rope], axis=-1) * shape.attention_scale
    k = mx.concatenate([k_nope, k_rope], axis=-1)
    logits = q @ k.swapaxes(-1, -2) + mask  # (B, H, L, L)
    largest = mx.stop_gradient(logits).max(axis=-1, keepdims=True)
    out = softmax(logits, largest) @ v
    return out.swapaxes(1, 2).reshape(B, L, -1) @ p[f"{name}.o_proj.weight"].T, largest.max(axis=(0, 2, 3))


def gated(p: Parameters, name: str, x: mx.array) -> mx.array:
    """Return silu(gate) * up of one feed-forward, or of a stack of them; x: (..., D) -> (..., width)."""
    gate, up = p[f"{name}.gate_proj.weight"], p[f"{name}.up_proj.weight"]
    both = x @ mx.concatenate([gate, up], axis=-2).swapaxes(-1, -2)
    width = gate.shape[-2]
    gate, up = both[..., :width], both[..., width:]
    return gate * sigmoid(gate) * up


def swiglu(p: Parameters, name: str, x: mx.array) -> mx.array:
    """The gated feed-forward of a dense layer or a shared expert."""
    return gated(p, name, x) @ p[f"{name}.down_proj.weight"].T


def _dispatch(x: mx.array, token_of_slot: mx.array, slot_of_token: mx.array) -> mx.array:
    return x[token_of_slot]


def _collect(slots: mx.array, token_of_slot: mx.array, slot_of_token: mx.array) -> mx.array:
    padded = mx.concatenate([slots, mx.zeros((1, slots.shape[-1]))])
    return padded[slot_of_token].sum(axis=1)


def _dispatch_gradient(inputs: list[mx.array], cotangent: mx.array, _: mx.array):
    return _collect(cotangent, *inputs[1:]), mx.zeros_like(inputs[1]), mx.zeros_like(inputs[2])


def _collect_gradient(inputs: list[mx.array], cotangent: mx.array, _: mx.array):
    return _dispatch(cotangent, *inputs[1:]), mx.zeros_like(inputs[1]), mx.zeros_like(inputs[2])


# Copy rows of x (T + 1, D; the last is zero) to slots (S, D); sum slots back into rows: each other's transpose. Both
# take token_of_slot (S,) and its inverse, slot_of_token (T + 1, k), so that neither has to scatter.
dispatch = with_gradient(_dispatch, _dispatch_gradient)
collect = with_gradient(_collect, _collect_gradient)


def route(p: Parameters, name: str, x: mx.array, shape: Shape) -> tuple[mx.array, mx.array]:
    """Return the weight of each expert for each token (T, E), zero if not chosen, and the choice."""
    scores = sigmoid(x @ p[f"{name}.gate.weight"].T)
    ranked = mx.stop_gradient(scores + p[f"{name}.gate.e_score_correction_bias"])
    k = shape.num_experts_per_tok
    threshold = mx.sort(ranked, axis=-1)[:, -k, None]
    chosen = ranked >= threshold
    weights = mx.where(chosen, scores, 0.0)
    return weights / weights.sum(axis=-1, keepdims=True) * shape.routed_scaling_factor, chosen


def experts(
    p: Parameters, name: str, x: mx.array, shape: Shape, capacity: float | None = None
) -> tuple[mx.array, mx.array]:
    """The routed experts, each on its own tokens. x: (T, D). Return (T, D) and the tokens per expert (E,)."""
    T, D = x.shape
    E, k = shape.n_routed_experts, shape.num_experts_per_tok
    weights, chosen = route(p, name, x, shape)
    chosen = chosen.astype(mx.int32)
    C = int(T * k / E * (CAPACITY if capacity is None else capacity))
    place = mx.cumsum(chosen, axis=0) - 1  # (T, E): place of the token in the expert's queue
    kept = (chosen > 0) & (place < C)
    token_of_slot = mx.full((E * C + 1,), T, dtype=mx.int32)
    slot = mx.where(kept, mx.arange(E) * C + place, E * C)
    token_of_slot = token_of_slot.at[slot.reshape(-1)].minimum(mx.repeat(mx.arange(T, dtype=mx.int32), E))[:-1]
    slot_of_token = mx.sort(slot, axis=-1)[:, :k]
    slot_of_token = mx.concatenate([slot_of_token, mx.full((1, k), E * C, dtype=slot_of_token.dtype)])
    padded = mx.concatenate([x, mx.zeros((1, D))])
    xe = dispatch(padded, token_of_slot, slot_of_token).reshape(E, C, D)
    # Rows of absent tokens are zero, so the weight that they get (the last token's) has no effect.
    expert_of_slot = mx.repeat(mx.arange(E), C)
    weight = weights.reshape(-1)[mx.minimum(token_of_slot, T - 1) * E + expert_of_slot].reshape(E, C, 1)
    hidden = gated(p, f"{name}.switch_mlp", xe) * weight
    out = hidden @ p[f"{name}.switch_mlp.down_proj.weight"].swapaxes(-1, -2)
    out = collect(out.reshape(E * C, D), token_of_slot, slot_of_token)[:-1]
    return out, mx.stop_gradient(chosen.sum(axis=0))


def feed_forward(
    p: Parameters, index: int, h: mx.array, shape: Shape, capacity: float | None = None
) -> tuple[mx.array, mx.array | None]:
    """Add a layer's feed-forward to h (T, D); return it, and the number of tokens per expert, if any."""
    layer = f"model.layers.{index}"
    x = mx.fast.rms_norm(h, p[f"{layer}.post_attention_layernorm.weight"], shape.rms_norm_eps)
    if index < shape.first_k_dense_replace:
        return h + swiglu(p, f"{layer}.mlp", x), None
    out, load = experts(p, f"{layer}.mlp", x, shape, capacity)
    return h + out + swiglu(p, f"{layer}.mlp.shared_experts", x), load


def _replace(rows: mx.array, others: mx.array, places: mx.array) -> mx.array:
    index = mx.arange(rows.shape[0])
    index[places] = rows.shape[0] + mx.arange(others.shape[0])
    return mx.concatenate([rows, others])[index]


def _replace_gradient(inputs: list[mx.array], cotangent: mx.array, _: mx.array):
    places = inputs[2]
    kept = mx.ones((cotangent.shape[0], 1))
    kept[places] = 0.0
    return cotangent * kept, cotangent[places], mx.zeros_like(places)


# Replace rows (T, D) at some places (n,) by others (n, D), without a scatter in the gradient.
replace_rows = with_gradient(_replace, _replace_gradient)


def hidden_states(
    p: Parameters,
    tokens: mx.array,
    segments: mx.array,
    positions: mx.array,
    shape: Shape,
    features: tuple[mx.array, mx.array] | None = None,
):
    """Run the layers. tokens, segments: (B, L); attention stays inside a segment.

    features: embeddings of pictures (n, D), and the places in the flattened rows that they fill (n,).

    Returns: hidden states (M, D) after the last norm at the M positions in the flattened rows, the largest
    attention logit of each layer's heads (layers, H), and the number of tokens per expert (MoE layers, E).
    """
    B, L = tokens.shape
    causal = mx.arange(L)[:, None] >= mx.arange(L)[None]
    mask = mx.where(causal & (segments[:, :, None] == segments[:, None, :]), 0.0, -1e9)[:, None]
    angles = mx.arange(L)[:, None] * mx.array(yarn_inverse_frequencies(shape.qk_rope_head_dim))
    rope = (mx.cos(angles), mx.sin(angles))
    h = p["model.embed_tokens.weight"][tokens.reshape(-1)]  # (T, D)
    if features is not None:
        h = replace_rows(h, *features)
    logits, loads = [], []
    for index in range(shape.num_hidden_layers):
        layer = f"model.layers.{index}"
        x = mx.fast.rms_norm(h, p[f"{layer}.input_layernorm.weight"], shape.rms_norm_eps)
        out, largest = attention(p, f"{layer}.self_attn", x.reshape(B, L, -1), mask, rope, shape)
        logits.append(largest)
        h = h + out.reshape(B * L, -1)
        if index == shape.num_hidden_layers - 1:
            h = h[positions]  # the others are not needed any more
        h, load = feed_forward(p, index, h, shape)
        if load is not None:
            loads.append(load)
    return mx.fast.rms_norm(h, p["model.norm.weight"], shape.rms_norm_eps), mx.stack(logits), mx.stack(loads)


def loss(p: Parameters, batch: Parameters, shape: Shape, features: tuple[mx.array, mx.array] | None = None):
    """Return the weighted mean of the cross-entropies, and the metrics of `hidden_states`.

    batch: tokens, segments (B, L); positions (M,) into the flattened rows, targets (M,), weights (M,).
    """
    h, logits, loads = hidden_states(p, batch["tokens"], batch["segments"], batch["positions"], shape, features)
    scores = h @ p["lm_head.weight"].T
    picked = mx.take_along_axis(scores, batch["targets"][:, None], axis=-1)[:, 0]
    losses = (logsumexp(scores) - picked) * batch["weights"]
    return losses.sum() / batch["weights"].sum(), logits, loads
