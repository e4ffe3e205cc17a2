"""Prompt lookup decoding: draft the tokens that followed an earlier occurrence of the last n-gram.

Source: Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from typing import TYPE_CHECKING

import numpy as np

from kimi_mlx.engine.drafts.drafter import Draft, Offer
from kimi_mlx.engine.request import FIRST_IMAGE_KEY
from kimi_mlx.engine.token_array import Ids

if TYPE_CHECKING:
    from kimi_mlx.engine.sequence import Sequence
    from kimi_mlx.engine.step_runner import InFlightStep

MIN_NGRAM, MAX_NGRAM = 2, 4
"""Lengths of the n-grams that are looked up. After a single token the drafts are rarely accepted."""


class PromptLookup:
    """Drafts from the tokens of each sequence.

    Each lookup searches all tokens: 0.1 ms for 128k. An index would take half a second and 100 MB to build.
    """

    def offer(self, sequence: Sequence, limit: int) -> Offer | None:
        """Offer the tokens that followed the last n-gram. Each length is a source: longer n-grams predict better."""
        draft, ngram = find_draft(sequence.token_array.ids, limit)
        return Offer(f"prompt lookup of {ngram} tokens", len(draft), draft) if draft else None

    def draft(self, requests: ListOf[tuple[Sequence, Offer, int]]) -> list[Draft]:
        """Return the offered drafts, each cut where its grammar forbids a token."""
        return [sequence.sampler.allowed_prefix(offer.tokens[:length]) for sequence, offer, length in requests]

    def observe(self, step: InFlightStep) -> None:
        """Do nothing: the tokens are enough."""


def find_draft(ids: Ids, limit: int) -> tuple[Draft, int]:
    """Return the tokens that followed the last n-gram when it occurred earlier, and the length of the n-gram.

    Where these tokens reach the end, they are repeated: the text has a period. The draft is empty if there is no such
    n-gram, and ends before an image.

    Args:
        ids: all known tokens.
        limit: maximum number of draft tokens.
    """
    end, ngram = find_earlier_ngram(ids)
    if end is None:
        return (), 0
    draft = np.resize(ids[end : end + limit], limit)
    images = np.flatnonzero(draft >= FIRST_IMAGE_KEY)
    return tuple(draft[: images[0] if images.size else None].tolist()), ngram


def find_earlier_ngram(ids: Ids) -> tuple[int | None, int]:
    """Find the longest n-gram at the end of `ids` that also occurs earlier.

    Returns:
        End of its latest earlier occurrence, and its length; (None, 0) if there is none.
    """
    if ids.size < MIN_NGRAM:
        return None, 0
    ends = np.flatnonzero(ids[:-1] == ids[-1]) + 1  # ends of the occurrences of the last token
    earlier_end, ngram = None, 0
    for length in range(MIN_NGRAM, MAX_NGRAM + 1):
        ends = ends[ends >= length]
        ends = ends[ids[ends - length] == ids[-length]] if length <= ids.size else ends[:0]
        if not ends.size:
            break
        earlier_end, ngram = int(ends[-1]), length
    return earlier_end, ngram
