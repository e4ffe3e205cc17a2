"""Prompt lookup decoding: draft the tokens that followed an earlier occurrence of the last n-gram.

Source: Saxena 2023, "Prompt Lookup Decoding"; the model verifies each draft, so the text does not change.
"""

from __future__ import annotations

from collections.abc import Iterable

NGRAMS = (4, 3, 2)
"""Lengths of the n-grams that are looked up, longest first. A single token predicts too little."""


class PromptLookup:
    """The tokens of a sequence, indexed by their n-grams.

    Args:
        max_tokens: maximum length of a draft.
    """

    def __init__(self, max_tokens: int):
        self._max_tokens = self._length = max_tokens
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the sequence."""
        for token in tokens:
            # An n-gram is indexed once a token follows it.
            for ngram in NGRAMS:
                if len(self._tokens) >= ngram:
                    self._ends[tuple(self._tokens[-ngram:])] = len(self._tokens)
            self._tokens.append(token)

    def draft(self, limit: int) -> tuple[int, ...]:
        """Return a draft; empty if no n-gram at the end has occurred before.

        Args:
            limit: maximum number of tokens.
        """
        for ngram in NGRAMS:
            end = self._ends.get(tuple(self._tokens[-ngram:])) if len(self._tokens) >= ngram else None
            if end is not None:
                return tuple(self._tokens[end : end + min(self._length, limit)])
        return ()

    def update_draft_length(self, drafted: int, accepted: int) -> None:
        """Double the draft length after a fully accepted draft; halve it after a fully rejected one."""
        if drafted and accepted == drafted:
            self._length = min(self._max_tokens, self._length * 2)
        elif drafted and not accepted:
            self._length = max(1, self._length // 2)


def accepted_length(draft: tuple[int, ...], sampled: list[int]) -> int:
    """Return the number of leading draft tokens that equal the sampled tokens."""
    pairs = zip(draft, sampled, strict=False)
    return next((at for at, (guess, token) in enumerate(pairs) if guess != token), len(draft))
