"""Fused against blockwise attention, at the head sizes of K2 and of kimi-mini, for all heads at once and for groups."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from kimi_mlx.gpu_check.context import Context
from kimi_mlx.gpu_check.random_model import RandomWeights, model_config
from kimi_mlx.gpu_check.reference import plain_products
from kimi_mlx.model.attention import Attention
from kimi_mlx.model.batch_layout import Segment
from kimi_mlx.model.device import device_kind
from kimi_mlx.model.device_traits import has_fused_attention

HEAD_SIZES = ((128, 64, 128), (32, 32, 32))
"""nope, rope and value width."""

HEADS = 8
LATENT = 512
MAX_QUERIES = 520
"""Queries are the last tokens, as in a chunk of a prompt; not a multiple of the kernels' block sizes."""

Q_STD = 0.3

LIMITS = {mx.float32: 2e-3, mx.bfloat16: 0.1}
"""The CPU, which sums in bfloat16, reaches 0.07."""


def check(context: Context) -> None:
    """Compare both forms on the device with blockwise attention on the CPU in float32."""
    for sizes in HEAD_SIZES:
        nope, rope, value = sizes
        config = replace(
            model_config(replace(context.sizes, has_k2_widths=False)),
            num_attention_heads=HEADS,
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=value,
            kv_lora_rank=LATENT,
        )
        weights = RandomWeights(config)
        layers = {dtype: Attention(config, weights.layer(0, dtype), 0) for dtype in LIMITS}
        mx.eval([layer.parameters() for layer in layers.values()])
        for total in context.sizes.attention_totals:
            context.progress(f"heads of {sizes}, {total} keys")
            _compare(context, layers, total)


def _compare(context: Context, layers: dict[mx.Dtype, Attention], total: int) -> None:
    length = min(total, MAX_QUERIES)
    reference = layers[mx.float32]
    q_dim, v_dim = reference.nope_dim + reference.rope_dim, reference.unembed_out.rows
    keys = mx.random.normal((1, 1, total, LATENT + reference.rope_dim), key=mx.random.key(5)).astype(mx.bfloat16)
    # scores of standard deviation 1: rounding those of a sharper softmax to bfloat16 would hide errors
    q = (Q_STD * mx.random.normal((1, HEADS, length, q_dim), key=mx.random.key(6))).astype(mx.bfloat16)
    segment = Segment(total - length, length, 0)
    with plain_products():
        expected = reference.blockwise(q.astype(mx.float32), keys.astype(mx.float32), segment)
        mx.eval(expected)
    for dtype, limit in LIMITS.items():
        name = f"{reference.nope_dim},{reference.rope_dim},{v_dim} T={total} {str(dtype).removeprefix('mlx.core.')}"
        inputs = q.astype(dtype), keys.astype(dtype)
        with context.on_device():
            outputs = {"blockwise": layers[dtype].blockwise(*inputs, Segment(total - length, length, 0))}
            kind = device_kind()
            if kind == "cpu" or has_fused_attention(kind, dtype.size, q_dim, v_dim, length):
                outputs |= {f"fused, {n} heads": layers[dtype].fused(*inputs, n) for n in (HEADS, 3, 1)}
            mx.eval(outputs)
        for label, actual in outputs.items():
            context.compare(f"{name} {label}", actual, expected, limit)
