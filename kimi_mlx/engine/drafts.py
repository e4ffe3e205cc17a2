"""Prompt lookup: the tokens that followed the same words before are the draft of what follows now.

Source: Saxena 2023, "Prompt Lookup Decoding"; the draft is checked by the model, so it changes no text.
"""

from __future__ import annotations

from collections.abc import Iterable

NGRAMS = (4, 3, 2)
"""Lengths of the endings that are looked up, the longest first; one token alone foretells too little."""


class PromptLookup:
    """The tokens of a sequence, indexed by the pieces that occur in them.

    Args:
        most: tokens of a draft at most.
    """

    def __init__(self, most: int):
        self._most = self._length = most
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """The sequence has become longer."""
        for token in tokens:
            # A piece is noted when something follows it.
            for ngram in NGRAMS:
                if len(self._tokens) >= ngram:
                    self._ends[tuple(self._tokens[-ngram:])] = len(self._tokens)
            self._tokens.append(token)

    def draft(self, room: int) -> tuple[int, ...]:
        """What may follow; empty if nothing like the end has occurred before.

        Args:
            room: tokens at most.
        """
        for ngram in NGRAMS:
            end = self._ends.get(tuple(self._tokens[-ngram:])) if len(self._tokens) >= ngram else None
            if end is not None:
                return tuple(self._tokens[end : end + min(self._length, room)])
        return ()

    def update_draft_length(self, drafted: int, accepted: int) -> None:
        """Draft more after a draft that was right to its end, less after one that was wrong from the start."""
        if drafted and accepted == drafted:
            self._length = min(self._most, self._length * 2)
        elif drafted and not accepted:
            self._length = max(1, self._length // 2)


def accepted_length(draft: tuple[int, ...], drawn: list[int]) -> int:
    """How many drafted tokens are the ones that the model has drawn at their places."""
    pairs = zip(draft, drawn, strict=False)
    return next((at for at, (guess, token) in enumerate(pairs) if guess != token), len(draft))
