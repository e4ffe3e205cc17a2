"""One step of the model on this rank: started early, its tokens drawn, what the leader said with it read.

Three kinds of ranks make the same steps. Alone, or with a part of every layer, a rank draws each token itself. In a
pipeline the leader alone draws: it takes the states of a step back only when it is the batch's turn again, so that
the steps of several batches are on their way at once; the others learn a token from the step that follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.batch_entry import Row
from kimi_mlx.engine.draw import Drawn, draw_rows
from kimi_mlx.model.decoder import Model, Part
from kimi_mlx.parallel.exchange import RankExchange, Said, Told
from kimi_mlx.parallel.pipeline import PipelineExchange


@dataclass
class Step:
    """A step on its way.

    Args:
        rows: what it has of each sequence.
        hidden: what the model has given, to be evaluated.
        commands: how many the leader had when it began; not known to other ranks.
        told: what came with it; None without others.
        drawn: from it; None if nothing is yet, or not here.
    """

    rows: list[Row]
    hidden: mx.array
    commands: int
    told: Told | None = None
    drawn: Drawn | None = None
    asked: int = field(init=False)
    """Tokens that are drawn from it."""

    def __post_init__(self) -> None:
        """Count."""
        self.asked = sum(row.last for row in self.rows)

    @property
    def length(self) -> int:
        """Tokens of it."""
        return sum(row.length for row in self.rows)


class Steps:
    """How this rank makes steps.

    Args:
        model: the model, or this rank's share.
        count_commands: asked on the leader for what goes with each step; see Said.
    """

    def __init__(self, model: Model, count_commands: Callable[[], int]):
        self._model = model
        self._exchange = model.exchange if isinstance(model.exchange, RankExchange) else None
        self._count_commands = count_commands
        self._pipeline = model.exchange if isinstance(model.exchange, PipelineExchange) else None

    @property
    def exchange(self) -> RankExchange | None:
        """The link to the other ranks; None without others."""
        return self._exchange

    @property
    def pipeline(self) -> PipelineExchange | None:
        """The same, if the ranks have layers one behind the other."""
        return self._pipeline

    @property
    def has_head(self) -> bool:
        """Whether this rank draws tokens."""
        return self._model.has_head

    def start(self, rows: list[Row], before: Step | None) -> Step:
        """Start a step; it is computed while others are built.

        Args:
            rows: what it has of each sequence; those that go on from a token of the step before come first.
            before: the step before, if there are such.
        """
        commands = self._count_commands()
        if self._exchange is not None:
            self._exchange.say(commands, sum(row.source is not None for row in rows))
        parts = [Part(row.sequence.layers, row.length, row.last) for row in rows]
        step = Step(rows, self._model.hidden(self._tokens(rows, before), parts), commands)
        if self._exchange is not None:
            if not step.asked:
                self._exchange.close(step.hidden)
            if not step.asked or self._pipeline is not None:
                step.told = self._exchange.told
        mx.async_eval(self._arrays(step))
        return step

    def wait(self, step: Step) -> None:
        """Wait until a step is computed, as far as it is computed here."""
        mx.eval(self._arrays(step))

    def draw(self, step: Step) -> None:
        """Draw the tokens of a step, where they are known; they are not waited for."""
        if step.drawn is not None or not step.asked or not self._model.has_head:
            return
        if self._exchange is not None and self._pipeline is None:
            self._exchange.say(step.commands, 0)
        step.drawn = draw_rows(self._model.logits(step.hidden)[0], step.rows)
        told: list[mx.array] = []
        if self._exchange is not None:
            step.told = self._exchange.told
            told = step.told.arrays
        mx.async_eval(step.drawn.arrays, *told)

    def read(self, step: Step, following: Step | None = None) -> tuple[dict[int, list[int]], Said]:
        """The tokens of a step, and what the leader said; waits for them.

        Args:
            step: whose tokens were drawn.
            following: the step that was started with them.

        Returns:
            By number of a row its tokens, none where they are not known and not needed, and what the leader said.
        """
        # Between ranks that add, what is said comes behind the work: that of the step before is ready.
        is_ahead = self._exchange is None or self._pipeline is not None
        said = self._said(following if is_ahead and following is not None else step)
        if step.drawn is not None:
            return step.drawn.read(step.rows), said
        if not step.asked:
            self.wait(step)
        sources = [] if following is None else [row.source for row in following.rows if row.source is not None]
        return {source: [token] for source, token in zip(sources, said.tokens, strict=False)}, said

    def _tokens(self, rows: list[Row], before: Step | None) -> mx.array:
        """The tokens of a step, (1, L); those that this rank does not know are 0."""
        picks = [cast(Step, before).rows[row.source].first for row in rows if row.source is not None]
        known = [token for row in rows if row.source is None for token in row.tokens]
        if not picks:
            return mx.array([known])
        if before is None or before.drawn is None:
            return mx.array([[0] * len(picks) + known])
        drawn = before.drawn.tokens
        if picks != list(range(drawn.size)):
            drawn = drawn[mx.array(picks)]
        return (mx.concatenate([drawn, mx.array(known, drawn.dtype)]) if known else drawn)[None]

    def _said(self, step: Step) -> Said:
        """What the leader said with a step."""
        if self._exchange is None or step.told is None:
            return Said(step.commands)
        return self._exchange.read(step.told)

    def _arrays(self, step: Step) -> list[mx.array]:
        told = [] if step.told is None else step.told.arrays
        # The states of whoever asks come of all layers' caches; of others the last layer's is wanted for itself.
        layers = [layer for row in step.rows if not row.last and row.is_alive for layer in row.sequence.layers]
        return [step.hidden, *told, *(array for layer in layers for array in layer.state)]
