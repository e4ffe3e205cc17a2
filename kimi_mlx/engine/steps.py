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

from kimi_mlx.engine.sampling import Sampler
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.exchange import RankExchange, Said, Told

QUIET = Said(is_stopped=False, commands=0)


@dataclass
class Step:
    """A step on its way.

    Args:
        hidden: what the model has given, to be evaluated.
        told: what came with it; None without others.
        token: (1,) the token drawn from its logits; None if it is not drawn yet, or not here.
    """

    hidden: mx.array
    told: Told | None
    token: mx.array | None = None


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
        self._is_stage = self._exchange is not None and self._exchange.is_pipeline

    @property
    def exchange(self) -> RankExchange | None:
        """The link to the other ranks; None without others."""
        return self._exchange

    def start(
        self,
        tokens: mx.array,
        layers: list[LatentCache],
        is_stopped: bool,
        draw: Sampler | None,
    ) -> Step:
        """Start a step; it is computed while others are built.

        Args:
            tokens: (1, L) integers.
            layers: the sequence's cache.
            is_stopped: whether the leader wants the sequence to end.
            draw: how the next token is drawn; None if none is, before the end of a prompt.
        """
        if self._exchange is not None:
            self._exchange.say(is_stopped, self._count_commands())
        hidden = self._model.hidden(tokens, layers, last=0 if draw is None else 1)
        token = None
        if draw is not None and not self._is_stage:
            token = draw(self._model.logits(hidden)[:, -1])
        if self._exchange is not None and not self._is_stage:
            self._exchange.close(is_last=draw is not None)
        told = None if self._exchange is None else self._exchange.told
        step = Step(hidden, told, token)
        mx.async_eval(self._arrays(step, layers))
        return step

    def wait(self, step: Step, layers: list[LatentCache]) -> None:
        """Wait until a step is computed, as far as it is computed here."""
        mx.eval(self._arrays(step, layers))

    def draw(self, step: Step, draw: Sampler) -> mx.array | None:
        """The token (1,) of a step, not waited for; None where it is not known."""
        if step.token is None and self._model.has_head:
            step.token = draw(self._model.logits(step.hidden)[:, -1])
            step.told = None if self._exchange is None else self._exchange.told
        return step.token

    def give_up(self, step: Step) -> None:
        """Let a step be computed whose token nobody wants."""
        if step.token is None and self._model.has_head:
            mx.async_eval(self._model.logits(step.hidden))

    def read(self, step: Step, following: Step | None) -> tuple[int | None, Said]:
        """The token of a step, and what the leader said; waits for them.

        Args:
            step: whose token was drawn.
            following: the step that was started with it.

        Returns:
            The token, None where it is not known and not needed, and what the leader said.
        """
        # In a pipeline what is said comes before the work, else it comes after it: then the step before is ready.
        told = following.told if self._is_stage and following is not None else step.told
        said = QUIET if self._exchange is None or told is None else self._exchange.read(told)
        if step.token is not None:
            return int(cast(int, step.token.item())), said
        return (said.tokens[-1] if said.tokens else None), said

    def said(self, step: Step) -> Said:
        """What the leader said with a step that has no token."""
        return QUIET if self._exchange is None or step.told is None else self._exchange.read(step.told)

    def _arrays(self, step: Step, layers: Sequence[LatentCache]) -> list[mx.array]:
        told = [] if step.told is None else [step.told.words]
        if step.token is not None:
            return [step.token, *told]
        return [step.hidden, *told, *(array for layer in layers for array in layer.state)]
