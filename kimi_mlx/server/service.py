"""Answers what is asked: prompt, engine, pieces."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial

import anyio.to_thread

from kimi_mlx.engine.request import Event, Finished, Interrupted, Prefilled, Request, Resumed, Token
from kimi_mlx.errors import RingError
from kimi_mlx.server.admission_queue import AdmissionQueue, QueueSlot
from kimi_mlx.server.conversation import AnswerEvent, ChatRequest, CompletionRequest, FinishEvent, KeepAlive
from kimi_mlx.server.errors import ApiError, api_error
from kimi_mlx.server.inbox import EventQueue
from kimi_mlx.server.metrics import Metrics
from kimi_mlx.server.prompts import PromptBuilder, request_for_choice
from kimi_mlx.server.response_builder import ResponseBuilder
from kimi_mlx.server.ring_log import RingLog
from kimi_mlx.session.session import Session, SessionStatus

LOG = logging.getLogger(__name__)

KEEP_ALIVE_INTERVAL_S = 5.0
"""After so long without anything to say comes a sign of life."""


class Service:
    """One model and whoever asks it.

    Args:
        session: the loaded model.
        model: its text side.
        places: answers that may wait for the engine.
        metrics: where to count.
    """

    def __init__(self, session: Session, model: PromptBuilder, places: int, metrics: Metrics):
        self.session = session
        self.prompt_builder = model
        self.metrics = metrics
        self.is_closing = False
        self.running = 0
        """Answers that the engine has begun."""
        self.ring_log = RingLog()
        self._line = AdmissionQueue(places, metrics)
        self._runs: set[_Run] = set()

    async def answer(self, *wishes: ChatRequest | CompletionRequest) -> AsyncGenerator[AnswerEvent, None]:
        """Answer; leaving the iteration, or cancelling its task, ends the answers soon.

        The answers are numbered through: those to the first wish, then those to the next.

        Raises:
            ApiError: they cannot be served; before the first item if that is known then.
        """
        if self.is_closing:
            raise stopping()
        turn = self._line.enter(sum(wish.n for wish in wishes), self.running)
        run = None
        try:
            readings, requests = await anyio.to_thread.run_sync(self._prepare, wishes)
            run = _Run(self, turn, readings)
            self._runs.add(run)
            # in a thread: a ring's session writes to its ranks
            await anyio.to_thread.run_sync(run.submit, requests)
            async for item in run.items():
                yield item
        except Exception as error:
            if (told := api_error(error)).code == "internal_error":
                LOG.exception("an answer has failed")
            raise told from error
        finally:
            turn.close()
            if run is not None:
                self._runs.discard(run)
                run.close()

    def _prepare(
        self, wishes: Sequence[ChatRequest | CompletionRequest]
    ) -> tuple[list[ResponseBuilder], list[Request]]:
        """Prompts take long, so this is done in a thread."""
        readings: list[ResponseBuilder] = []
        requests: list[Request] = []
        tokenizer = self.prompt_builder.tokenizer.tokenizer
        for wish in wishes:
            prepared = self.prompt_builder.prepare(wish)
            for number in range(wish.n):
                reader = prepared.reader()
                readings.append(ResponseBuilder(len(readings), tokenizer, reader, wish.stop, counts_prompt=number == 0))
                requests.append(request_for_choice(prepared.request, number))
        return readings, requests

    def status(self) -> SessionStatus:
        """How the engine is getting on."""
        return self.session.status()

    @property
    def waiting(self) -> int:
        """Answers that the engine has not begun."""
        return self._line.waiting

    def close(self) -> None:
        """End all answers, and refuse new ones; the engine's step is not waited for."""
        self.is_closing = True
        for run in list(self._runs):
            run.stop()
        self.session.cancel_all()


class _Run:
    """The answers to one request while they are made."""

    def __init__(self, service: Service, turn: QueueSlot, readings: Sequence[ResponseBuilder]):
        self._session, self._metrics = service.session, service.metrics
        self._service, self._turn = service, turn
        self._inbox = EventQueue()
        self._open = {reading.index: reading for reading in readings}
        self._request_ids: dict[int, int] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self._asked_at = time.monotonic()
        self._heard_at: dict[int, float] = {}  # of answers that have begun, when their last token came
        self._state = KeepAlive()

    def submit(self, requests: Sequence[Request]) -> None:
        """Ask the engine; in a thread, which may go on when whoever waited for it has gone."""
        for index, request in enumerate(requests):
            if self._is_closed:
                return
            request_id = self._session.submit(request, partial(self._inbox.put, index))
            with self._lock:
                self._request_ids[index] = request_id
                is_late = self._is_closed
            if is_late:
                self._session.cancel(request_id)

    def stop(self) -> None:
        """Tell whoever reads that the server ends."""
        for index in list(self._open):
            self._inbox.put(index, stopping())

    async def items(self) -> AsyncGenerator[AnswerEvent, None]:
        """What comes, until all answers have ended."""
        said_at = time.monotonic()
        while self._open:
            for index, event in await self._inbox.take(said_at + KEEP_ALIVE_INTERVAL_S - time.monotonic()):
                if index in self._open:
                    for item in self._hear(index, event):
                        yield item
                        said_at = time.monotonic()
            if time.monotonic() - said_at >= KEEP_ALIVE_INTERVAL_S:
                yield self._state
                said_at = time.monotonic()

    def close(self) -> None:
        """Withdraw what is not finished; what is being submitted is withdrawn then."""
        with self._lock:
            self._is_closed = True
        for index in list(self._open):
            self._end(index)
            if index in self._request_ids:
                self._session.cancel(self._request_ids[index])
                self._metrics.cancelled.inc()

    def _hear(self, index: int, event: Event | BaseException) -> Iterator[AnswerEvent]:
        if isinstance(event, BaseException):
            self._end(index)
            if isinstance(event, RingError):
                self._service.ring_log.gone(event)
            raise event
        if isinstance(event, Interrupted):
            self._metrics.interruptions.inc()
            self._service.ring_log.lost(event)
            self._state = KeepAlive(reason=event.reason)
            yield self._state
        elif isinstance(event, Resumed):
            self._service.ring_log.back(event)
            self._state = KeepAlive()
        else:
            self._begin(index)
            yield from self._read(index, event)

    def _read(self, index: int, event: Prefilled | Token | Finished) -> Iterator[AnswerEvent]:
        reading = self._open[index]
        if isinstance(event, Prefilled):
            self._state = KeepAlive(event.done, event.total)
        elif isinstance(event, Token):
            if not reading.is_stopped:
                self._measure(index, is_first=reading.generated == 0)
                yield from reading.add(event)
                if reading.is_stopped:
                    self._session.cancel(self._request_ids[index])
        else:
            self._end(index)
            if event.reason == "cancelled" and not reading.is_stopped:
                raise stopping()
            for item in reading.finish(event):
                if isinstance(item, FinishEvent):
                    self._metrics.count(item.usage)
                yield item

    def _begin(self, index: int) -> None:
        if index not in self._heard_at:
            self._heard_at[index] = self._asked_at
            self._turn.begin()
            self._service.running += 1

    def _end(self, index: int) -> None:
        del self._open[index]
        if index in self._heard_at:
            self._service.running -= 1

    def _measure(self, index: int, *, is_first: bool) -> None:
        now = time.monotonic()
        figure = self._metrics.ttft if is_first else self._metrics.gap
        figure.observe(now - self._heard_at[index])
        self._heard_at[index] = now


def stopping() -> ApiError:
    """The server ends, or somebody has cancelled everything."""
    return ApiError(503, "the server is being stopped", "stopping")
