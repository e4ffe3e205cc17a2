"""Small real classes that replace slow or remote components."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import TracebackType

import mlx.core as mx
import numpy as np

import kimi_mlx
from kimi_mlx.engine.events import Event, Finished, FinishReason, Prefilled, Statistics, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import EngineError
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.session.local_chat_model import LocalChatModel
from kimi_mlx.session.model_status import ModelDeployment
from kimi_mlx.session.session import EventCallback, Session, SessionStatus
from kimi_mlx.text.template import ChatTemplate

KIMI_MINI = Path(kimi_mlx.__file__).parent / "models" / "kimi-mini"
K25_TEMPLATE = Path(__file__).parent / "unit" / "text" / "templates" / "k25.jinja"


class FixedSession:
    """A session that answers every request with the same tokens.

    Args:
        ids: tokens of the answer.
        pause_s: time between two tokens.
        is_endless: whether to repeat the answer until it is cancelled.
        is_stubborn: whether to ignore cancellation.
        before: callback for each request; its exception fails the request.
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
        """Yield prefill progress, tokens and the end."""
        self._cancelled.clear()
        self._before(request)
        self.requests.append(request)
        total, generated = len(request.prompt), 0
        reason: FinishReason = "stop"
        yield Prefilled(0, total)
        yield Prefilled(total, total)
        due = time.monotonic()
        for token in self._ids:
            due += self._pause_s
            time.sleep(max(0.0, due - time.monotonic()))
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
        """Do the same on a thread; one request at a time."""

        def run() -> None:
            for event in self.generate(request):
                on_event(event)

        threading.Thread(target=run, daemon=True).start()
        return 1

    def cancel(self, request_id: int) -> None:
        """Cancel the answer."""
        self.cancel_all()

    context = 65536
    image_error: EngineError | None = None

    def status(self) -> SessionStatus:
        """Report a healthy session."""
        return SessionStatus(True)

    def cancel_all(self) -> None:
        """Cancel the answer."""
        self._cancelled.set()

    def reset(self) -> None:
        """Count the call."""
        self.resets += 1

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Session:
        """Return the session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing."""


class FixedGather:
    """A group in which the other ranks always contribute the same arrays.

    Args:
        rank: this rank.
        size: number of ranks.
        others: array of each other rank, in rank order.
    """

    def __init__(self, rank: int, size: int, others: Sequence[np.ndarray]):
        self.rank, self.size, self._others = rank, size, others

    def gather(self, x: mx.array) -> mx.array:
        """Return the arrays of all ranks."""
        rows = [mx.array(other) for other in self._others]
        return mx.stack([*rows[: self.rank], x, *rows[self.rank :]])

    def sum(self, x: mx.array) -> mx.array:
        """Return the sum over all ranks."""
        return self.gather(x).sum(axis=0)


@cache
def mini_tokenizer() -> ChatTokenizer:
    """Return kimi-mini's tokenizer, which takes 30 ms to load."""
    return ChatTokenizer.load(KIMI_MINI)


def chat_model_of(session: Session, tokenizer: ChatTokenizer) -> LocalChatModel:
    """Return a chat model, in this process, of a session that answers as kimi-mini does or in its place."""
    return LocalChatModel(session, tokenizer, ModelDeployment("fake", "hybrid", None, load_config(KIMI_MINI)))


def conversation_of(
    answer: str,
    reasoning: str = "",
    pause_s: float = 0.0,
    is_endless: bool = False,
    is_stubborn: bool = False,
    sees_images: bool = False,
) -> Conversation:
    """Return a conversation with kimi-mini's tokenizer in which every answer is the same.

    With sees_images the chat template is that of K2.5, and the session accepts images.
    """
    tokenizer = mini_tokenizer()
    if sees_images:
        tokenizer = replace(tokenizer, template=ChatTemplate(K25_TEMPLATE.read_text()))
    end_of_reasoning = [tokenizer.tokenizer.special_tokens["</think>"]]
    ids = [*tokenizer.encode(reasoning), *end_of_reasoning, *tokenizer.encode(answer)]
    session = FixedSession(ids, pause_s, is_endless, is_stubborn)
    if not sees_images:
        session.image_error = EngineError("this model does not see images", hint="choose one that does")
    return Conversation(chat_model_of(session, tokenizer))
