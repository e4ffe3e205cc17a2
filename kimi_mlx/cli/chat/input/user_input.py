"""A message as the user entered it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UserInput:
    """A message as the user entered it, typed or pasted.

    Attributes:
        text: the message, with all pasted text in it.
        pasted: ranges of the text that were shown as blocks, in order.
    """

    text: str
    pasted: tuple[range, ...] = ()

    @property
    def is_typed_command(self) -> bool:
        """Whether the message begins with a slash that was typed, or pasted as a short text."""
        start = len(self.text) - len(self.text.lstrip())
        return self.text[start : start + 1] == "/" and not self.is_pasted(start)

    def is_pasted(self, position: int) -> bool:
        """Return whether a position of the text belongs to a pasted block."""
        return any(position in block for block in self.pasted)
