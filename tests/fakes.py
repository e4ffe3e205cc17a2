"""Small real classes that stand in for slow or distant things."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import mlx.core as mx
import numpy as np

import kimi_mlx
from kimi_mlx.engine.request import Event, Finished, FinishReason, Prefilled, Request, Statistics, Token
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.session.session import EventCallback, Session, SessionStatus

KIMI_MINI = Path(kimi_mlx.__file__).parent / "models" / "kimi-mini"


class FixedSession:
    """A session that answers every request with the same tokens.

    Args:
        ids: the answer.
        pause_s: before each token.
        is_endless: begins again after the last token, until it is cancelled.
        is_stubborn: does not obey cancel.
        before: called with each request; what it raises ends the request.
    """

    def __init__(
        self,
        ids: Sequence[int],
        pause_s: float = 0.0,
        is_endless: bool = False,
        is_stubborn: bool = False,
        before: Callable[[Request], None] = lambda request: None,
    ):
        self._ids = itertools.cycle(ids) if is_endless else ids
        self._pause_s = pause_s
        self._is_stubborn = is_stubborn
        self._before = before
        self._cancelled = threading.Event()
        self.requests: list[Request] = []
        self.resets = 0

    def generate(self, request: Request) -> Iterator[Event]:
        """The prompt's progress, the tokens, the end."""
        self._cancelled.clear()
        self._before(request)
        self.requests.append(request)
        total, generated = len(request.prompt), 0
        reason: FinishReason = "stop"
        yield Prefilled(0, total)
        yield Prefilled(total, total)
        for token in self._ids:
            time.sleep(self._pause_s)
            if self._cancelled.is_set() and not self._is_stubborn:
                reason = "cancelled"
                break
            generated += 1
            yield Token(token)
            if generated == request.max_tokens:
                reason = "length"
                break
        yield Finished(reason, Statistics(total, 0, generated, ttft_s=0.5, decode_s=2.0, peak_memory_bytes=10**9))

    def submit(self, request: Request, on_event: EventCallback) -> int:
        """The same, from a thread; there is one request at a time."""

        def run() -> None:
            for event in self.generate(request):
                on_event(event)

        threading.Thread(target=run, daemon=True).start()
        return 1

    def cancel(self, request_id: int) -> None:
        """End the answer."""
        self.cancel_all()

    context = 65536

    def status(self) -> SessionStatus:
        """All is well."""
        return SessionStatus(True)

    def cancel_all(self) -> None:
        """End the answer."""
        self._cancelled.set()

    def reset(self) -> None:
        """Count it."""
        self.resets += 1

    def close(self) -> None:
        """Nothing to free."""

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to free."""


class FixedGather:
    """A group in which the other ranks always say the same.

    Args:
        rank: this one.
        size: of the group.
        others: what each of the others says, in the order of the ranks.
    """

    def __init__(self, rank: int, size: int, others: Sequence[np.ndarray]):
        self.rank, self.size, self._others = rank, size, others

    def gather(self, x: mx.array) -> mx.array:
        """Everybody's."""
        rows = [mx.array(other) for other in self._others]
        return mx.stack([*rows[: self.rank], x, *rows[self.rank :]])

    def sum(self, x: mx.array) -> mx.array:
        """Over all ranks."""
        return self.gather(x).sum(axis=0)


def conversation_of(
    answer: str,
    reasoning: str = "",
    pause_s: float = 0.0,
    is_endless: bool = False,
    is_stubborn: bool = False,
) -> Conversation:
    """A conversation with kimi-mini's text side in which every answer is the same."""
    tokenizer = ChatTokenizer.load(KIMI_MINI)
    end_of_reasoning = [tokenizer.tokenizer.special_tokens["</think>"]]
    ids = [*tokenizer.encode(reasoning), *end_of_reasoning, *tokenizer.encode(answer)]
    return Conversation(FixedSession(ids, pause_s, is_endless, is_stubborn), tokenizer)
