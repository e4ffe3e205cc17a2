"""What all layers of one forward pass share, computed once for them.

Letters: H heads, L length, T tokens in the cache with the new ones.
"""

from __future__ import annotations

from functools import cache, cached_property

import mlx.core as mx

from kimi_mlx.model.rope import Rope
from kimi_mlx.model.sizes import QUERY_BLOCK


class Step:
    """`length` new tokens after `offset` ones in the cache.

    Attributes:
        rotate: rotates queries and keys of the new tokens, (B, H, L, P), to their positions.
    """

    def __init__(self, rope: Rope, offset: int, length: int):
        self.offset, self.length = offset, length
        self.rotate = rope.at(offset, length)
        self._rope = rope
        self._masks: dict[tuple[int, mx.Dtype], mx.array] = {}

    def last(self, count: int) -> Step:
        """The step of the last `count` of the new tokens alone."""
        skipped = self.length - count
        return Step(self._rope, self.offset + skipped, count) if skipped else self

    @cached_property
    def diagonal(self) -> mx.array:
        """The mask that kimi_mlx.model.blockwise.attend takes, float32."""
        return causal_mask(QUERY_BLOCK, max(QUERY_BLOCK, self.length), mx.float32)

    def mask(self, heads: int, dtype: mx.Dtype) -> mx.array:
        """Additive causal mask for scores with the queries of each head in turn: (H * L, T); (1,) if L is 1."""
        if self.length == 1:
            return no_mask(dtype)
        if (heads, dtype) not in self._masks:
            mask = causal_mask(self.length, self.offset + self.length, dtype)
            self._masks[heads, dtype] = mx.tile(mask, (heads, 1))
        return self._masks[heads, dtype]


@cache
def no_mask(dtype: mx.Dtype) -> mx.array:
    """Zero, (1,); kept, so that a decode step does not make it again."""
    zero = mx.zeros((1,), dtype)
    mx.eval(zero)
    return zero


def causal_mask(length: int, total: int, dtype: mx.Dtype) -> mx.array:
    """Additive mask (length, total): query i, the one at total - length + i, sees the keys up to itself."""
    visible = mx.arange(total)[None] <= mx.arange(total - length, total)[:, None]
    return mx.where(visible, mx.array(0.0, dtype), mx.array(-mx.inf, dtype))
