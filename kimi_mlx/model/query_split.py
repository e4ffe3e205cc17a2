"""Division of a step's queries over ranks that each have all weights of the attention. Pure; does not import MLX.

Each rank computes queries, attention and output projection of its own queries, and a gather per layer gives every rank
the outputs of all. That saves most of the attention's time, and costs the gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kimi_mlx.model.attention_cost import AttentionCost
from kimi_mlx.model.config import DecoderConfig


@dataclass(frozen=True)
class QueryCost:
    """Seconds of one layer's attention on a rank.

    Args:
        read_s: time to read the weights, the minimum however few the queries are.
        row_s: projections of a query: from the hidden state to the heads, and the output projection.
        absorb_s: absorption of a query in the latent space, or expansion of a cached token by heads.
        latent_pair_s: a query and a key in the latent space.
        head_pair_s: a query and a key by heads.
    """

    read_s: float
    row_s: float
    absorb_s: float
    latent_pair_s: float
    head_pair_s: float

    @classmethod
    def of(cls, config: DecoderConfig, cost: AttentionCost, weights_bytes: int) -> QueryCost:
        """Return the cost on a device.

        Args:
            config: dimensions of the model.
            cost: cost of attention on the device, with all heads.
            weights_bytes: bytes of the weights of a layer's attention.
        """
        shape, tuning = cost.shape, cost.tuning
        width = shape.heads * (shape.nope_dim + shape.rope_dim)
        rank = config.q_lora_rank
        values = config.hidden_size * width if rank is None else rank * (config.hidden_size + width)
        values += shape.heads * shape.value_dim * config.hidden_size
        return cls(
            read_s=weights_bytes / tuning.read_bytes_per_s,
            row_s=2 * values / tuning.weight_flops,
            absorb_s=cost.expand_s,
            latent_pair_s=cost.latent_pair_s,
            head_pair_s=cost.head_pair_s,
        )

    def rows(self, offset: int, length: int) -> np.ndarray:
        """Return the seconds of each of `length` queries after `offset` cached tokens, float64 (length,).

        By heads the expansion of the keys does not count, because every rank repeats it.
        """
        keys = np.arange(offset + 1, offset + length + 1, dtype=np.float64)
        pairs = length * (offset + length)
        is_latent = length == 1 or pairs * self.latent_pair_s <= offset * self.absorb_s + pairs * self.head_pair_s
        if is_latent:
            return self.row_s + self.absorb_s + keys * self.latent_pair_s
        return self.row_s + keys * self.head_pair_s


@dataclass(frozen=True)
class QuerySplit:
    """Decides whether and where the queries of a step are divided. Equal on all ranks, so all make the same decision.

    Args:
        num_ranks: number of ranks.
        cost: cost of attention on each rank.
        token_bytes: bytes of a hidden state in a message.
        gathers: measured (bytes of a rank's part, seconds) of gathers, in ascending order of size.
    """

    num_ranks: int
    cost: QueryCost
    token_bytes: int
    gathers: tuple[tuple[float, float], ...]

    def gather_s(self, num_bytes: float) -> float:
        """Return the seconds of a gather of `num_bytes` per rank: interpolated, beyond the last size in proportion."""
        sizes, seconds = zip(*self.gathers, strict=True)
        return float(np.interp(num_bytes, sizes, seconds)) * max(1.0, num_bytes / sizes[-1])

    def bounds(self, lengths: Sequence[tuple[int, int]]) -> tuple[int, ...] | None:
        """Return the bounds of the ranks' queries; None if the division does not save time.

        Later queries of a prompt see more keys, so the ranges have equal time, not equal length.

        Args:
            lengths: (cached, new) token counts of each sequence; the new ones are queries.

        Returns:
            num_ranks + 1 ascending indices into the queries of all sequences; no range is empty.
        """
        count = sum(length for _, length in lengths)
        if count < self.num_ranks:
            return None
        sums = np.cumsum(np.concatenate([[0.0], *(self.cost.rows(*pair) for pair in lengths)]))
        ranks = np.arange(1, self.num_ranks)
        inner = np.searchsorted(sums, sums[-1] * ranks / self.num_ranks)
        inner = np.clip(inner, ranks, count - self.num_ranks + ranks)
        bounds = np.concatenate([[0], np.maximum.accumulate(inner), [count]])
        slowest_s = float(np.diff(sums[bounds]).max())
        saved_s = max(float(sums[-1]), self.cost.read_s) - max(slowest_s, self.cost.read_s)
        if saved_s <= self.gather_s(int(np.diff(bounds).max()) * self.token_bytes):
            return None
        return tuple(map(int, bounds))
