"""Prompt lookup decoding: draft the tokens that followed an earlier occurrence of the last n-gram.

Source: Saxena 2023, "Prompt Lookup Decoding"; the model verifies each draft, so the text does not change.
"""

from __future__ import annotations

import numpy as np

from kimi_mlx.engine.request import FIRST_IMAGE_KEY
from kimi_mlx.engine.token_array import Ids, TokenArray

NGRAMS = (4, 3, 2)
"""Lengths of the n-grams that are looked up, longest first. A single token predicts too little."""


class PromptLookup:
    """Drafts from the tokens of a sequence.

    Each lookup searches all tokens: 0.1 ms for 128k. An index would take half a second and 100 MB to build.

    Args:
        tokens: tokens of the sequence, to which others append.
        max_tokens: maximum length of a draft.
    """

    def __init__(self, tokens: TokenArray, max_tokens: int):
        self._tokens = tokens
        self._max_tokens = self._length = max_tokens

    def draft(self, limit: int) -> tuple[int, ...]:
        """Return a draft; empty if no n-gram at the end has occurred before. It ends before an image.

        Args:
            limit: maximum number of tokens.
        """
        ids = self._tokens.ids
        end = find_earlier_ngram(ids)
        if end is None:
            return ()
        draft = ids[end : end + min(self._length, limit)]
        images = np.flatnonzero(draft >= FIRST_IMAGE_KEY)
        return tuple(draft[: images[0] if images.size else None].tolist())

    def update_draft_length(self, drafted: int, accepted: int) -> None:
        """Double the draft length after a fully accepted draft; halve it after a fully rejected one."""
        if drafted and accepted == drafted:
            self._length = min(self._max_tokens, self._length * 2)
        elif drafted and not accepted:
            self._length = max(1, self._length // 2)


def find_earlier_ngram(ids: Ids) -> int | None:
    """Find the longest n-gram at the end of `ids` that also occurs earlier.

    Returns:
        End of its latest earlier occurrence; None if there is none.
    """
    if ids.size < NGRAMS[-1]:
        return None
    ends = np.flatnonzero(ids[:-1] == ids[-1]) + 1  # ends of the occurrences of the last token
    earlier_end = None
    for length in range(2, NGRAMS[0] + 1):
        ends = ends[ends >= length]
        ends = ends[ids[ends - length] == ids[-length]] if length <= ids.size else ends[:0]
        if not ends.size:
            break
        if length in NGRAMS:
            earlier_end = int(ends[-1])
    return earlier_end


def accepted_length(draft: tuple[int, ...], sampled: list[int]) -> int:
    """Return the number of leading draft tokens that equal the sampled tokens."""
    pairs = zip(draft, sampled, strict=False)
    return next((at for at, (guess, token) in enumerate(pairs) if guess != token), len(draft))
