"""What a step has of one sequence."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_mlx.engine.sequence import Sequence


@dataclass(frozen=True)
class Row:
    """The tokens of a sequence in a step.

    Args:
        sequence: whose they are.
        run: which of its runs; it has begun another one, or ended, if the numbers differ.
        length: tokens that are fed.
        last: how many are drawn, behind so many positions at the end.
        position: of the first drawn one in its sequence.
        first: which of the tokens that are drawn from the step is the first of these.
        tokens: that are fed, if they are known.
        source: the row of the step before from whose token this one goes on.
        draft: at the end of `tokens`, what may be right.
    """

    sequence: Sequence
    run: int
    length: int
    last: int
    position: int
    first: int
    tokens: tuple[int, ...] = ()
    source: int | None = None
    draft: tuple[int, ...] = ()

    @property
    def is_alive(self) -> bool:
        """Whether its sequence still waits for what the step gives."""
        return self.sequence.run == self.run
