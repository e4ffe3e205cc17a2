"""One step of the model on this rank: started early, its token drawn, what the leader said with it read.

Three kinds of ranks make the same steps. Alone, or with a part of every layer, a rank draws each token itself. In a
pipeline the leader alone draws: it takes the states of a step back only when it is the sequence's turn again, so that
the steps of several sequences are on their way at once; the others learn a token from the step that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.sampling import Draw
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.exchange import RankExchange, Said, Told
from kimi_mlx.parallel.pipeline import PipelineExchange


@dataclass
class Step:
    """A step on its way.

    Args:
        hidden: what the model has given, to be evaluated.
        is_stopped: whether the leader wanted the sequence to end; false on other ranks.
        told: what came with it; None without others.
        last: how many tokens are drawn from it, behind each of its last positions.
        position: of the first of them in its sequence.
        tokens: (last,) drawn; None if they are not yet, or not here.
    """

    hidden: mx.array
    is_stopped: bool
    told: Told | None
    last: int
    position: int
    tokens: mx.array | None = None


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
    def has_head(self) -> bool:
        """Whether this rank draws tokens."""
        return self._model.has_head

    def lead(self, length: int, kept: Sequence[int]) -> None:
        """Tell the other ranks of a pipeline how long the next step is; nobody else needs to hear it.

        Args:
            length: tokens of the step; 0 if there is none.
            kept: of the tokens of the step before, those that stay in the cache.
        """
        if self._pipeline is not None:
            self._pipeline.lead(length, kept)

    def follow(self) -> tuple[int, tuple[int, ...]]:
        """What the leader has told by `lead`; waits for it."""
        assert self._pipeline is not None
        return self._pipeline.follow()

    def start(
        self,
        tokens: mx.array,
        layers: list[LatentCache],
        is_stopped: bool,
        draw: Draw,
        last: int = 1,
        position: int = 0,
    ) -> Step:
        """Start a step; it is computed while others are built.

        Args:
            tokens: (1, L) integers.
            layers: the sequence's cache.
            is_stopped: whether the leader wants the sequence to end.
            draw: how tokens are drawn.
            last: how many: behind so many positions at the end.
            position: of the first of them.
        """
        if self._exchange is not None:
            self._exchange.say(is_stopped, self._count_commands())
        step = Step(self._model.hidden(tokens, layers, last), is_stopped, None, last, position)
        if last and self._pipeline is None:
            self._draw(step, draw)
        if self._exchange is not None:
            if not last:
                self._exchange.close(step.hidden)
            step.told = self._exchange.told
        mx.async_eval(self._arrays(step, layers))
        return step

    def wait(self, step: Step, layers: list[LatentCache]) -> None:
        """Wait until a step is computed, as far as it is computed here."""
        mx.eval(self._arrays(step, layers))

    def draw(self, step: Step, draw: Draw) -> mx.array | None:
        """The tokens (last,) of a step, not waited for; None where they are not known."""
        if step.tokens is None and self._model.has_head:
            self._draw(step, draw)
            step.told = None if self._exchange is None else self._exchange.told
        return step.tokens

    def give_up(self, step: Step) -> None:
        """Let a step be computed whose tokens nobody wants."""
        if step.tokens is None and self._model.has_head:
            mx.async_eval(self._model.logits(step.hidden))

    def read(self, step: Step, following: Step | None = None) -> tuple[list[int], Said]:
        """The tokens of a step, and what the leader said; waits for them.

        Args:
            step: whose tokens were drawn.
            following: the step that was started with them.

        Returns:
            The tokens, none where they are not known and not needed, and what the leader said.
        """
        # Between ranks that add, what is said comes behind the work: that of the step before is ready.
        is_ahead = self._exchange is None or self._pipeline is not None
        said = self.said(following if is_ahead and following is not None else step)
        if step.tokens is not None:
            return cast(list[int], step.tokens.tolist()), said
        return list(said.tokens) if following is not None else [], said

    def said(self, step: Step) -> Said:
        """What the leader said with a step."""
        if self._exchange is None or step.told is None:
            return Said(step.is_stopped, commands=0)
        return self._exchange.read(step.told)

    def _draw(self, step: Step, draw: Draw) -> None:
        logits = self._model.logits(step.hidden)
        drawn = [draw(logits[:, at], step.position + at) for at in range(step.last)]
        step.tokens = drawn[0] if step.last == 1 else mx.concatenate(drawn)

    def _arrays(self, step: Step, layers: Sequence[LatentCache]) -> list[mx.array]:
        told = [] if step.told is None else step.told.arrays
        if step.tokens is not None:
            return [step.tokens, *told]
        return [step.hidden, *told, *(array for layer in layers for array in layer.state)]
