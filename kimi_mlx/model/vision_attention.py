"""Attention of the vision tower: every patch of an image to all of its patches, without storing all scores.

The largest image has 17,856 patches: the scores of one block would take 20 GB in float32.
Letters: H heads, P patches of an image, Q size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from kimi_mlx.model.device import device_kind
from kimi_mlx.model.device_traits import has_fused_attention
from kimi_mlx.model.sizes import vision_query_block


def attend_images(q: mx.array, k: mx.array, v: mx.array, lengths: Sequence[int]) -> mx.array:
    """Compute the attention of concatenated images, each to itself.

    Args:
        q: (1, H, sum of lengths, Q), not scaled; k and v likewise.
        k: keys.
        v: values.
        lengths: number of patches of each image. Frames of a chunk of a video are one image here.

    Returns:
        (1, H, sum of lengths, Q).
    """
    outputs: list[mx.array] = []
    start = 0
    for length in lengths:
        image = slice(start, start + length)
        outputs.append(attend_image(q[:, :, image], k[:, :, image], v[:, :, image]))
        start += length
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def attend_image(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Compute the attention of some patches, (1, H, L, Q), to all of their image, in the form that suits the device.

    Args:
        q: (1, H, L, Q), not scaled.
        k: (1, H, P, Q); v likewise.
        v: values.
    """
    width = q.shape[-1]
    if has_fused_attention(device_kind(), q.itemsize, width, width, q.shape[2]):
        return fused(q, k, v)
    return blockwise(q, k, v, vision_query_block(q.shape[1], k.shape[2]))


def fused(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Compute attention, (1, H, P, Q), with MLX's kernel, which does not store the scores."""
    is_forced = device_kind() == "metal"
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, force_fused=is_forced)


def blockwise(q: mx.array, k: mx.array, v: mx.array, block: int) -> mx.array:
    """Compute attention, (1, H, P, Q), for `block` queries at a time, one block after the other."""
    q, k = q * q.shape[-1] ** -0.5, k.swapaxes(-1, -2)
    outputs: list[mx.array] = []
    for start in range(0, q.shape[2], block):
        queries = q[:, :, start : start + block]
        if outputs:
            queries = mx.depends(queries, outputs[-1:])
        outputs.append(mx.softmax(queries @ k, axis=-1, precise=True) @ v)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
