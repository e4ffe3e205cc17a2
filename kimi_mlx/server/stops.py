"""Texts that end an answer, found across the borders of its pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopSequences:
    """Passes text on, except for what may turn out to begin one of the texts.

    Args:
        texts: none of them empty.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts = tuple(texts)
        self._held = ""
        self.found: str | None = None
        """The text that has ended the answer."""

    def add(self, text: str) -> str:
        """Take a piece; returns what may be shown. Nothing is shown after the end."""
        if self.found is not None:
            return ""
        if not self._texts:
            return text
        text = self._held + text
        ends = [(at, stop) for stop in self._texts if (at := text.find(stop)) >= 0]
        if ends:
            at, self.found = min(ends, key=lambda end: end[0])
            self._held = ""
            return text[:at]
        kept = max(_overlap(text, stop) for stop in self._texts)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was held back; the answer is over."""
        rest = self._held
        self._held = ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
