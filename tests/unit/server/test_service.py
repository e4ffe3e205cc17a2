"""The service, on a session whose events come from the test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import pytest

from kimi_mlx.engine.events import (
    Event,
    Finished,
    FinishReason,
    Interrupted,
    Logprobs,
    Prefilled,
    Resumed,
    Statistics,
    Token,
)
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import ContextLengthError, EngineError, RingError
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.api_types import AnswerEvent, ChatRequest, CompletionRequest, DeltaEvent, FinishEvent, KeepAlive
from kimi_mlx.server.errors import ApiError, PromptTooLongError
from kimi_mlx.server.health import health_problem
from kimi_mlx.server.metrics import Metrics
from kimi_mlx.server.prompts import PromptBuilder
from kimi_mlx.server.remote_images import ImageFetcher
from kimi_mlx.server.response_builder import StopSequences
from kimi_mlx.server.service import Service
from kimi_mlx.session.session import EventCallback, SessionStatus
from kimi_mlx.text.messages import Message
from tests.fakes import KIMI_MINI

CHAT_REQUEST = ChatRequest(messages=(Message("user", "hi"),), thinking=False)


class ScriptedSession:
    """A session whose events are sent by the test."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.callbacks: list[EventCallback] = []
        self.cancelled: list[int] = []
        self.state = SessionStatus(is_up=True)

    def submit(self, request: Request, on_event: EventCallback) -> int:
        self.requests.append(request)
        self.callbacks.append(on_event)
        return len(self.requests)

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)

    def generate(self, request: Request) -> Iterator[Event]:
        raise NotImplementedError

    def cancel_all(self) -> None:
        for on_event in self.callbacks:
            on_event(finished("cancelled"))

    context = 1000
    image_error = None

    def status(self) -> SessionStatus:
        return self.state

    def reset(self) -> None: ...

    def close(self) -> None: ...

    async def wait_for_requests(self, count: int = 1) -> None:
        """Wait until this many requests have been submitted."""
        while len(self.requests) < count:
            await asyncio.sleep(0.001)

    async def wait_for_cancellations(self, request_ids: list[int]) -> None:
        """Wait until exactly these requests have been cancelled."""
        while self.cancelled != request_ids:
            await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.load(KIMI_MINI)


@pytest.fixture
def session() -> ScriptedSession:
    return ScriptedSession()


@pytest.fixture
def service(session: ScriptedSession, tokenizer: ChatTokenizer) -> Service:
    return Service(session, PromptBuilder(tokenizer, 1000, {"temperature": 0.5}), 3, Metrics(), ImageFetcher())


def finished(reason: FinishReason = "stop") -> Finished:
    return Finished(reason, Statistics(9, 8, 3, 0.1, 0.1, 0))


async def collect(service: Service, *requests: ChatRequest | CompletionRequest) -> list[AnswerEvent]:
    prepared = [service.prompt_builder.prepare(request) for request in requests]
    return [event async for event in service.answer(*prepared)]


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 10)

    asyncio.run(main())


def test_engine_events_become_deltas_and_a_finish(
    service: Service, session: ScriptedSession, tokenizer: ChatTokenizer
) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, CHAT_REQUEST))
        await session.wait_for_requests()
        on_event = session.callbacks[0]
        on_event(Prefilled(0, 9))
        for id in tokenizer.encode("Hello there"):
            on_event(Token(id, Logprobs(-0.5, ((id, -0.5),))))
        on_event(finished())
        *deltas, finish = await task
        assert "".join(event.delta.text for event in deltas if isinstance(event, DeltaEvent)) == "Hello there"
        tokens = [token for event in deltas if isinstance(event, DeltaEvent) for token in event.logprobs]
        assert b"".join(token.token for token in tokens) == b"Hello there"
        assert isinstance(finish, FinishEvent)
        assert (finish.reason, finish.usage.prompt_tokens, finish.usage.cached_tokens) == ("stop", 9, 8)
        assert session.requests[0].sampling.temperature == 0.5  # recommended for answers without thinking

    run(work)


def test_a_full_queue_refuses_requests_until_answers_end(service: Service, session: ScriptedSession) -> None:
    limit = 3

    async def work() -> None:
        tasks = [asyncio.create_task(collect(service, CHAT_REQUEST)) for _ in range(limit)]
        await session.wait_for_requests(limit)
        with pytest.raises(ApiError) as caught:
            await collect(service, CHAT_REQUEST)
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert caught.value.retry_after_s == 1
        with pytest.raises(ApiError, match=f"at most {limit} can wait") as caught:
            await collect(service, ChatRequest(messages=CHAT_REQUEST.messages, n=limit + 1))
        assert caught.value.status == 400
        session.callbacks[0](Prefilled(0, 9))
        while service.waiting == limit:
            await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(collect(service, CHAT_REQUEST)))
        await session.wait_for_requests(limit + 1)
        assert (service.running, service.waiting) == (1, limit)
        with pytest.raises(ApiError, match=f"1 answers are running and {limit} are waiting"):
            await collect(service, CHAT_REQUEST)
        for on_event in session.callbacks:
            on_event(finished())
        await asyncio.gather(*tasks)
        assert (service.running, service.waiting) == (0, 0)

    run(work)


def test_a_prompt_beyond_the_context_of_a_restarted_ring_is_too_long(
    service: Service, session: ScriptedSession
) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, CompletionRequest(prompt=(5,) * 30, place="prompt[0]")))
        await session.wait_for_requests()
        session.callbacks[0](ContextLengthError("the KV cache holds less than before"))
        with pytest.raises(PromptTooLongError, match=r"is 1000 tokens.* resulted in 30 tokens") as caught:
            await task
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt[0]")

    run(work)


@pytest.mark.parametrize(
    ("error", "status"), [(EngineError("no"), 400), (RingError("lost"), 503), (ValueError("ours"), 500)]
)
def test_errors_of_the_engine_reach_the_client(
    service: Service, session: ScriptedSession, error: Exception, status: int
) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, ChatRequest(messages=CHAT_REQUEST.messages, n=2)))
        await session.wait_for_requests(2)
        session.callbacks[1](error)
        with pytest.raises(ApiError) as caught:
            await task
        assert caught.value.status == status
        await session.wait_for_cancellations([1])
        assert "ours" not in caught.value.message
        assert service.waiting == 0

    run(work)


def test_a_lost_ring_is_logged_once(
    service: Service, session: ScriptedSession, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, ChatRequest(messages=CHAT_REQUEST.messages, n=2)))
        await session.wait_for_requests(2)
        lost = Interrupted("rank 1 is lost", 1, 3)
        for event in (lost, Resumed(2.0), finished()):
            for on_event in session.callbacks:
                on_event(event)
        await task

    run(work)
    assert [(record.levelname, record.message) for record in caplog.records if "ring" in record.message] == [
        ("WARNING", "lost the ring: rank 1 is lost (restart 1 of 3)"),
        ("WARNING", "the ring is up again after 2.0 s"),
    ]


def test_the_final_failure_of_a_ring_is_logged_once(
    service: Service, session: ScriptedSession, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        tasks = [asyncio.create_task(collect(service, CHAT_REQUEST)) for _ in range(2)]
        await session.wait_for_requests(2)
        ring_error = RingError("rank 1 is lost, 3 times")
        for on_event in session.callbacks:
            on_event(ring_error)
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, ApiError)
            assert (error.status, error.code) == (503, "ring_lost")

    run(work)
    assert [record.message for record in caplog.records] == ["the ring failed for good: rank 1 is lost, 3 times"]


def test_an_answer_survives_the_loss_of_the_ring(
    service: Service, session: ScriptedSession, tokenizer: ChatTokenizer
) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, CHAT_REQUEST))
        await session.wait_for_requests()
        on_event = session.callbacks[0]
        on_event(Interrupted("rank 1 is lost", 1, 3))
        on_event(Resumed(2.0))
        for id in tokenizer.encode("Hi"):
            on_event(Token(id))
        on_event(finished())
        events = await task
        assert events[0] == KeepAlive(reason="rank 1 is lost")
        assert isinstance(events[-1], FinishEvent)

    run(work)


def test_health_problems(service: Service) -> None:
    assert health_problem(service, SessionStatus(is_up=True, last_step_age_s=500)) is None  # idle
    assert health_problem(service, SessionStatus(is_up=True, active=1, last_step_age_s=5)) is None
    assert (
        health_problem(service, SessionStatus(is_up=True, active=1, last_step_age_s=500))
        == "the last step ended 500 s ago"
    )
    assert health_problem(service, SessionStatus(is_up=False, reason="rank 1 is lost")) == "rank 1 is lost"
    service.close()
    assert health_problem(service, SessionStatus(is_up=True)) == "the server is shutting down"


def test_a_stop_text_cancels_the_request(service: Service, session: ScriptedSession, tokenizer: ChatTokenizer) -> None:
    async def work() -> None:
        task = asyncio.create_task(
            collect(service, ChatRequest(messages=CHAT_REQUEST.messages, thinking=False, stop=("lo th",)))
        )
        await session.wait_for_requests()
        for id in tokenizer.encode("Hello there, you"):
            session.callbacks[0](Token(id))
        while not session.cancelled:
            await asyncio.sleep(0.001)
        session.callbacks[0](finished("cancelled"))
        *deltas, finish = await task
        assert "".join(event.delta.text for event in deltas if isinstance(event, DeltaEvent)) == "Hel"
        assert isinstance(finish, FinishEvent)
        assert (finish.reason, finish.stop_sequence) == ("stop", "lo th")

    run(work)


def test_a_disconnect_cancels_all_answers(service: Service, session: ScriptedSession) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, ChatRequest(messages=CHAT_REQUEST.messages, n=2)))
        await session.wait_for_requests(2)
        session.callbacks[0](finished())
        while service.waiting == 2:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await session.wait_for_cancellations([2])
        assert (service.running, service.waiting) == (0, 0)

    run(work)


def test_shutdown_ends_all_answers(service: Service, session: ScriptedSession) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, CHAT_REQUEST))
        await session.wait_for_requests()
        service.close()
        for answer in (task, collect(service, CHAT_REQUEST)):
            with pytest.raises(ApiError) as caught:
                await answer
            assert (caught.value.status, caught.value.code) == (503, "stopping")

    run(work)


def test_seeds_of_several_answers_differ(service: Service, session: ScriptedSession) -> None:
    async def work() -> None:
        request = ChatRequest(messages=CHAT_REQUEST.messages, n=3, sampling={"seed": 2**63 - 1, "temperature": 1.0})
        task = asyncio.create_task(collect(service, request))
        await session.wait_for_requests(3)
        assert [request.sampling.seed for request in session.requests] == [2**63 - 1, 0, 1]
        for on_event in session.callbacks:
            on_event(finished())
        await task

    run(work)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_stop_texts_are_found_across_deltas(size: int) -> None:
    for text, stops, expected in (
        ("one two three", ("two",), "one "),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("xyz", ("zz", "yzz"), "xyz"),
        ("first second", ("second", "st"), "fir"),
    ):
        sequences = StopSequences(stops)
        sent = [sequences.add(text[at : at + size]) for at in range(0, len(text), size)]
        if sequences.matched is None:
            sent.append(sequences.finish())
        assert "".join(sent) == expected


def test_requests_submitted_after_a_disconnect_are_cancelled(service: Service, session: ScriptedSession) -> None:
    submit, may_continue = session.submit, threading.Event()

    def slow_submit(request: Request, on_event: EventCallback) -> int:
        request_id = submit(request, on_event)
        may_continue.wait(5)
        return request_id

    session.submit = slow_submit  # pyright: ignore[reportAttributeAccessIssue]

    async def work() -> None:
        task = asyncio.create_task(collect(service, ChatRequest(messages=CHAT_REQUEST.messages, n=3)))
        await session.wait_for_requests()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert service.waiting == 0
        may_continue.set()
        while not session.cancelled:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert (len(session.requests), session.cancelled) == (1, [1])

    run(work)


def test_shutdown_does_not_wait_for_the_engine(service: Service, session: ScriptedSession) -> None:
    session.cancel_all = lambda: None  # pyright: ignore[reportAttributeAccessIssue]

    async def work() -> None:
        task = asyncio.create_task(collect(service, CHAT_REQUEST))
        await session.wait_for_requests()
        service.close()
        with pytest.raises(ApiError, match="shutting down"):
            await task

    run(work)


def test_a_session_that_waits_delays_neither_the_status_nor_other_answers(
    service: Service, session: ScriptedSession
) -> None:
    """A ring holds its lock while it restarts; a cancellation then waits in a thread."""
    is_free = threading.Event()
    session.cancel = lambda request_id: is_free.wait(5) and session.cancelled.append(request_id)  # pyright: ignore

    async def work() -> None:
        task = asyncio.create_task(collect(service, CHAT_REQUEST))
        await session.wait_for_requests()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        other = asyncio.create_task(collect(service, CHAT_REQUEST))
        await session.wait_for_requests(2)
        session.callbacks[1](finished())
        assert isinstance((await other)[-1], FinishEvent)
        assert not session.cancelled
        is_free.set()
        await session.wait_for_cancellations([1])

    run(work)


def test_a_full_queue_refuses_to_prepare_requests(service: Service, session: ScriptedSession) -> None:
    limit = 3
    is_free = threading.Event()

    def wait(prompt_builder: PromptBuilder, body: bytes) -> bool:
        return is_free.wait(5)

    async def work() -> None:
        tasks = [asyncio.create_task(service.prepare(wait, b"")) for _ in range(limit)]
        while service.waiting < limit:
            await asyncio.sleep(0.001)
        with pytest.raises(ApiError) as caught:
            await service.prepare(wait, b"")
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert "--max-queue" not in caught.value.message
        is_free.set()
        assert all(await asyncio.gather(*tasks))
        assert service.waiting == 0

    run(work)


def test_an_answer_that_waits_too_long_is_refused(session: ScriptedSession, tokenizer: ChatTokenizer) -> None:
    prompt_builder = PromptBuilder(tokenizer, 1000, {})
    service = Service(session, prompt_builder, 3, Metrics(), ImageFetcher())

    async def work() -> None:
        started = asyncio.create_task(collect(service, CHAT_REQUEST))
        await session.wait_for_requests()
        session.callbacks[0](Prefilled(0, 9))
        while not service.running:
            await asyncio.sleep(0.001)
        service.max_wait_s = 0.01  # not before, because the first one also waits
        with pytest.raises(ApiError, match="waited 0 s behind 1 running") as caught:
            await collect(service, CHAT_REQUEST)
        assert (caught.value.status, caught.value.code) == (429, "queue_timeout")
        assert "--max-wait" in (caught.value.hint or "")
        await session.wait_for_cancellations([2])
        session.callbacks[0](finished())
        assert isinstance((await started)[-1], FinishEvent)
        assert service.waiting == 0

    run(work)


def test_requests_know_their_client(service: Service, session: ScriptedSession) -> None:
    async def work() -> None:
        prepared = service.prompt_builder.prepare(replace(CHAT_REQUEST, n=2))
        events = service.answer(prepared, client="key 1")
        task = asyncio.ensure_future(anext(events))
        await session.wait_for_requests(2)
        assert [request.client for request in session.requests] == ["key 1", "key 1"]
        session.callbacks[0](Token(1))
        await task
        await events.aclose()

    run(work)
