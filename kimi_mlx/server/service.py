"""Service: answers the requests of all APIs with one session."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial

import anyio
import anyio.to_thread

from kimi_mlx.engine.events import Encoded, Event, Finished, Interrupted, Prefilled, PromptLogprobs, Resumed, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import ContextLengthError, RingError
from kimi_mlx.server.activity import AnswerProgress, RateCounter, RunningAnswer
from kimi_mlx.server.admission_queue import MAX_RETRY_S, AdmissionQueue, QueueSlots
from kimi_mlx.server.api_types import AnswerEvent, FinishEvent, KeepAlive, ProgressEvent
from kimi_mlx.server.errors import ApiError, PromptTooLongError, api_error
from kimi_mlx.server.event_queue import EventQueue, LoopWaker
from kimi_mlx.server.message_content import MissingMediaError
from kimi_mlx.server.metrics import Metrics
from kimi_mlx.server.preparation import Preparation, Result, Work
from kimi_mlx.server.prompts import PreparedRequest, PromptBuilder, request_for_choice
from kimi_mlx.server.remote_images import ImageFetcher
from kimi_mlx.server.response_builder import ResponseBuilder
from kimi_mlx.server.ring_log import RingLog
from kimi_mlx.session.session import Session, SessionStatus

LOG = logging.getLogger(__name__)

KEEP_ALIVE_INTERVAL_S = 5.0
"""Time without other events after which a KeepAlive is sent."""


MAX_WAIT_S = 600.0
"""Longest time that an answer waits for the engine, unless the server has another limit."""


class AnswerHandle:
    """Ends the answers to one request from another task than the one that receives them, in the event loop."""

    def __init__(self) -> None:
        self._cancel: Callable[[ApiError], None] | None = None
        self._error: ApiError | None = None

    def stop(self, error: ApiError) -> None:
        """End the answers, even if they have not begun yet. The task that receives them gets the first error."""
        if self._error is not None:
            return
        self._error = error
        if self._cancel is not None:
            self._cancel(error)

    def attach(self, cancel: Callable[[ApiError], None]) -> None:
        """Set the function that ends the answers, once they have begun."""
        self._cancel = cancel
        if self._error is not None:
            cancel(self._error)


class Service:
    """Answers requests with one session.

    Args:
        session: session with the loaded model.
        prompt_builder: builder of the engine's requests.
        queue_capacity: maximum number of answers that wait for the engine.
        max_wait_s: longest time that an answer waits.
        metrics: metrics of the server.
        image_fetcher: fetcher of images that requests name by URL.
    """

    def __init__(
        self,
        session: Session,
        prompt_builder: PromptBuilder,
        queue_capacity: int,
        metrics: Metrics,
        image_fetcher: ImageFetcher,
        max_wait_s: float = MAX_WAIT_S,
    ):
        self.session = session
        self.prompt_builder = prompt_builder
        self.metrics = metrics
        self.is_closing = False
        self._preparation = Preparation(prompt_builder)
        self.image_fetcher = image_fetcher
        self.running = 0
        """Number of answers that the engine is generating."""
        self.ring_log = RingLog()
        self.queue_capacity, self.max_wait_s = queue_capacity, max_wait_s
        self.rates = RateCounter()
        self._queue = AdmissionQueue(queue_capacity, metrics)
        self._active: dict[_ActiveRequest, None] = {}  # in the order in which they arrived
        self._incoming: set[anyio.CancelScope] = set()

    @contextmanager
    def until_closing(self) -> Generator[None]:
        """Receive and prepare a request in this context, which ends when the server shuts down.

        Raises:
            ApiError: 503, the server is shutting down.
        """
        if self.is_closing:
            raise shutting_down()
        with anyio.CancelScope() as scope:
            self._incoming.add(scope)
            try:
                yield
            finally:
                self._incoming.discard(scope)
        if scope.cancelled_caught:
            raise shutting_down()

    async def prepare(self, work: Work[Result], body: bytes) -> Result:
        """Prepare a request in a thread or in another process, and fetch the images that it names by URL.

        Args:
            work: function that prepares it.
            body: its body.

        Raises:
            ApiError: the request is invalid, or the queue is full.
        """
        with self._queue.hold_slot(self.running):
            try:
                return await self._preparation.run(work, body)
            except MissingMediaError as error:
                urls = error.urls
            return await self._preparation.run(work, body, await self.image_fetcher.fetch(urls))

    async def answer(
        self, *requests: PreparedRequest, client: str = "", handle: AnswerHandle | None = None
    ) -> AsyncGenerator[AnswerEvent, None]:
        """Yield the events of all answers. Closing the generator, or cancelling its task, cancels the answers.

        Answers are numbered over all requests: first those to the first request, then those to the next.

        Args:
            requests: requests, each for one or several answers.
            client: client that sent them; waiting requests of different clients take turns.
            handle: handle with which another task can end the answers.

        Raises:
            ApiError: the requests cannot be served, or an answer failed; raised before the first event if possible.
        """
        if self.is_closing:
            raise shutting_down()
        slots = self._queue.enter(sum(request.n for request in requests), self.running)
        active = None
        try:
            return_progress = any(request.return_progress for request in requests)
            active = _ActiveRequest(self, slots, self._new_builders(requests), return_progress)
            self._active[active] = None
            if handle is not None:
                handle.attach(active.cancel)
            answers = (
                request_for_choice(request.request, at, client) for request in requests for at in range(request.n)
            )
            # in a thread, because the session of a ring writes to its ranks
            await anyio.to_thread.run_sync(active.submit, answers)
            async for event in active.events():
                yield event
        except Exception as error:
            response_error = self._api_error(error, requests)
            if response_error.code == "internal_error":
                LOG.exception("an answer failed")
            raise response_error from error
        finally:
            slots.close()
            if active is not None:
                del self._active[active]
                active.close()

    def _api_error(self, error: Exception, requests: Sequence[PreparedRequest]) -> ApiError:
        """Return the error response to requests. A ring that has restarted may have a smaller context than before."""
        if not isinstance(error, ContextLengthError):
            return api_error(error)
        longest = max(requests, key=lambda request: len(request.request.prompt))
        return PromptTooLongError(len(longest.request.prompt), self.session.context, longest.place)

    async def start_worker(self) -> None:
        """Start a worker process for the preparation of long requests."""
        await self._preparation.start_worker()

    def _new_builders(self, requests: Sequence[PreparedRequest]) -> list[ResponseBuilder]:
        """Return a builder for each answer."""
        tokenizer = self.prompt_builder.tokenizer.tokenizer
        builders: list[ResponseBuilder] = []
        for request in requests:
            for choice in range(request.n):
                reader = request.new_reader(tokenizer)
                builder = ResponseBuilder(
                    len(builders),
                    tokenizer,
                    reader,
                    request.stop,
                    counts_prompt=choice == 0,
                    min_tokens=request.request.min_tokens,
                    has_all_logprobs=request.call_ids is None,
                    prompt=() if request.request.prompt_logprobs is None else request.request.prompt,
                )
                builders.append(builder)
        return builders

    @cached_property
    def waker(self) -> LoopWaker:
        """Waker of the event loop that answers requests; used there first."""
        return LoopWaker()

    def status(self) -> SessionStatus:
        """Return the status of the session."""
        return self.session.status()

    @property
    def is_receiving(self) -> bool:
        """Whether a request is being received or prepared."""
        return bool(self._incoming)

    @property
    def waiting(self) -> int:
        """Number of answers that the engine has not started."""
        return self._queue.waiting

    def running_answers(self) -> list[RunningAnswer]:
        """Return the answers in progress and those in the queue, the oldest first."""
        return [answer for active in self._active for answer in active.describe()]

    def cancel(self, request_id: int) -> None:
        """Cancel a request of the session; in a thread, because it waits while a ring restarts."""
        asyncio.get_running_loop().run_in_executor(None, self.session.cancel, request_id)

    def close(self) -> None:
        """End all answers and refuse new requests, without waiting for the engine's current step."""
        self.is_closing = True
        for scope in list(self._incoming):
            scope.cancel()
        for active in list(self._active):
            active.stop()


class _ActiveRequest:
    """The answers to one request while they are generated.

    Args:
        service: service that answers the request.
        slots: its slots in the queue.
        builders: builder of each answer.
        return_progress: whether to yield ProgressEvents.
    """

    def __init__(self, service: Service, slots: QueueSlots, builders: Sequence[ResponseBuilder], return_progress: bool):
        self._session, self._metrics = service.session, service.metrics
        self._service, self._slots = service, slots
        self._queue = EventQueue(service.waker)
        self._open = {builder.index: builder for builder in builders}
        self._request_ids: dict[int, int] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self._return_progress = return_progress
        self._created_at = time.monotonic()
        self._progress = {builder.index: AnswerProgress(self._created_at) for builder in builders}
        self._last_token_at: dict[int, float] = {}  # by index, for answers that have started
        self._state = KeepAlive()

    def submit(self, requests: Iterable[Request]) -> None:
        """Submit the requests to the engine; runs in a thread, which may outlive the client's connection."""
        for index, request in enumerate(requests):
            if self._is_closed:
                return
            request_id = self._session.submit(request, partial(self._queue.put, index))
            with self._lock:
                self._request_ids[index] = request_id
                is_closed = self._is_closed
            if is_closed:
                self._session.cancel(request_id)

    def stop(self) -> None:
        """End all answers because the server is shutting down."""
        for index in list(self._open):
            self._queue.put(index, shutting_down())

    def cancel(self, error: ApiError) -> None:
        """End all answers with an error, and free the engine."""
        with self._lock:
            request_ids = dict(self._request_ids)
        for index in list(self._open):
            self._queue.put(index, error)
            if index in request_ids:  # others are cancelled once they are submitted
                self._service.cancel(request_ids[index])
            self._metrics.cancelled.inc()

    async def events(self) -> AsyncGenerator[AnswerEvent, None]:
        """Yield events until all answers have ended."""
        sent_at = time.monotonic()
        while self._open:
            self._check_wait()
            for index, event in await self._queue.take(sent_at + KEEP_ALIVE_INTERVAL_S - time.monotonic()):
                if index in self._open:
                    for answer_event in self._handle(index, event):
                        yield answer_event
                        sent_at = time.monotonic()
            if time.monotonic() - sent_at >= KEEP_ALIVE_INTERVAL_S:
                yield self._state
                sent_at = time.monotonic()

    def _check_wait(self) -> None:
        """Refuse the request if none of its answers was started in time.

        Raises:
            ApiError: 429.
        """
        limit_s = self._service.max_wait_s
        if not self._last_token_at and time.monotonic() - self._created_at > limit_s:
            self._metrics.refused.inc(len(self._open))
            message = f"the answer has waited {limit_s:.0f} s behind {self._service.running} running ones; retry later"
            hint = "use fewer clients, or start the server with a larger --max-wait"
            raise ApiError(429, message, "queue_timeout", retry_after_s=MAX_RETRY_S, hint=hint)

    def close(self) -> None:
        """Cancel unfinished requests, including those still being submitted."""
        with self._lock:
            self._is_closed = True
        for index in list(self._open):
            if index in self._request_ids:
                self._service.cancel(self._request_ids[index])
                self._metrics.cancelled.inc()
            self._end(index)

    def _handle(self, index: int, event: Event | BaseException) -> Iterator[AnswerEvent]:
        if isinstance(event, BaseException):
            self._end(index)
            if isinstance(event, RingError):
                self._service.ring_log.on_failed(event)
            raise event
        if isinstance(event, Interrupted):
            self._metrics.interruptions.inc()
            self._service.ring_log.on_interrupted(event)
            self._state = KeepAlive(reason=event.reason)
            yield self._state
            yield from self._report(index, event)
        elif isinstance(event, Resumed):
            self._service.ring_log.on_resumed(event)
            self._state = KeepAlive()
            yield from self._report(index, event)
        else:
            self._start(index)
            yield from self._build(index, event)

    def _build(
        self, index: int, event: Encoded | Prefilled | PromptLogprobs | Token | Finished
    ) -> Iterator[AnswerEvent]:
        builder = self._open[index]
        if isinstance(event, Encoded):
            yield from self._report(index, event)
        elif isinstance(event, Prefilled):
            self._state = KeepAlive(event.done, event.total)
            self._service.rates.add(prompt=self._progress[index].prefill(event.done, event.total))
            yield from self._report(index, event)
        elif isinstance(event, PromptLogprobs):
            builder.add_prompt(event)
        elif isinstance(event, Token):
            if not builder.is_stopped:
                self._observe_latency(index, is_first=builder.num_tokens == 0)
                self._service.rates.add(completion=1)
                yield from builder.add(event)
                if builder.is_stopped:
                    self._service.cancel(self._request_ids[index])
        else:
            self._end(index)
            if event.reason == "cancelled" and not builder.is_stopped:
                raise shutting_down()
            for answer_event in builder.finish(event):
                if isinstance(answer_event, FinishEvent):
                    self._metrics.add_usage(answer_event.usage)
                yield answer_event

    def _report(self, index: int, event: Encoded | Prefilled | Interrupted | Resumed) -> Iterator[AnswerEvent]:
        """Yield the progress of the first of the open answers, if the client wants it."""
        if self._return_progress and index == min(self._open):
            progress = self._progress[index]
            yield ProgressEvent(event, progress.cached_tokens, progress.elapsed_s)

    def describe(self) -> list[RunningAnswer]:
        """Return the unfinished answers."""
        return [self._progress[index].describe(builder.num_tokens) for index, builder in self._open.items()]

    def _start(self, index: int) -> None:
        self._progress[index].start()
        if index not in self._last_token_at:
            self._last_token_at[index] = self._created_at
            self._slots.start_one()
            self._service.running += 1

    def _end(self, index: int) -> None:
        del self._open[index]
        if index in self._last_token_at:
            self._service.running -= 1

    def _observe_latency(self, index: int, *, is_first: bool) -> None:
        now = time.monotonic()
        histogram = self._metrics.ttft if is_first else self._metrics.gap
        histogram.observe(now - self._last_token_at[index])
        self._last_token_at[index] = now


def shutting_down() -> ApiError:
    """Return the error of requests that are cancelled because the server shuts down."""
    return ApiError(503, "the server is shutting down", "stopping")
