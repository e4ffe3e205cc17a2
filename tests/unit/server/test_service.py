"""The service between clients and an engine whose events the test chooses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator

import pytest

from kimi_mlx.engine.engine import MAX_SEQUENCES
from kimi_mlx.engine.request import (
    Event,
    Finished,
    FinishReason,
    Interrupted,
    Logprobs,
    Prefilled,
    Request,
    Resumed,
    Statistics,
    Token,
)
from kimi_mlx.errors import EngineError, RingError
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.conversation import AnswerEvent, ChatRequest, CompletionRequest, DeltaEvent, FinishEvent, KeepAlive
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.health import health_problem
from kimi_mlx.server.metrics import Metrics
from kimi_mlx.server.prompts import PromptBuilder
from kimi_mlx.server.response_builder import StopSequences
from kimi_mlx.server.service import Service
from kimi_mlx.session.session import EventCallback, SessionStatus
from kimi_mlx.text.messages import Message
from tests.fakes import KIMI_MINI

ASK = ChatRequest(messages=(Message("user", "hi"),), thinking=False)


class ScriptedSession:
    """A session whose answers are given by hand."""

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

    def status(self) -> SessionStatus:
        return self.state

    def reset(self) -> None: ...

    def close(self) -> None: ...

    async def asked(self, count: int = 1) -> None:
        """Until so many requests have come."""
        while len(self.requests) < count:
            await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.load(KIMI_MINI)


@pytest.fixture
def session() -> ScriptedSession:
    return ScriptedSession()


@pytest.fixture
def service(session: ScriptedSession, tokenizer: ChatTokenizer) -> Service:
    return Service(session, PromptBuilder(tokenizer, 1000, {"temperature": 0.5}), 3, Metrics())


def finished(reason: FinishReason = "stop") -> Finished:
    return Finished(reason, Statistics(9, 8, 3, 0.1, 0.1, 0))


async def collect(service: Service, *wishes: ChatRequest | CompletionRequest) -> list[AnswerEvent]:
    return [item async for item in service.answer(*wishes)]


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 10)

    asyncio.run(main())


def test_events_become_pieces_and_an_end(service: Service, session: ScriptedSession, tokenizer: ChatTokenizer) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, ASK))
        await session.asked()
        on_event = session.callbacks[0]
        on_event(Prefilled(0, 9))
        for id in tokenizer.encode("Hello there"):
            on_event(Token(id, Logprobs(-0.5, ((id, -0.5),))))
        on_event(finished())
        *pieces, end = await task
        assert "".join(piece.delta.text for piece in pieces if isinstance(piece, DeltaEvent)) == "Hello there"
        tokens = [token for piece in pieces if isinstance(piece, DeltaEvent) for token in piece.logprobs]
        assert b"".join(token.token for token in tokens) == b"Hello there"
        assert isinstance(end, FinishEvent)
        assert (end.reason, end.usage.prompt_tokens, end.usage.cached_tokens) == ("stop", 9, 8)
        assert session.requests[0].sampling.temperature == 0.5  # as is recommended where it does not think

    run(work)


def test_a_full_line_is_told_and_freed(service: Service, session: ScriptedSession) -> None:
    most = MAX_SEQUENCES + 3  # what the engine could begin does not count as waiting

    async def work() -> None:
        tasks = [asyncio.create_task(collect(service, ASK)) for _ in range(most)]
        await session.asked(most)
        with pytest.raises(ApiError) as caught:
            await collect(service, ASK)
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert caught.value.retry_after_s == 1
        with pytest.raises(ApiError, match=f"the limit is {most}") as caught:
            await collect(service, ChatRequest(messages=ASK.messages, n=most + 1))
        assert caught.value.status == 400
        session.callbacks[0](Prefilled(0, 9))
        while service.waiting == most:
            await asyncio.sleep(0.001)
        with pytest.raises(ApiError, match=r"1 answers are running and \d+ are waiting"):  # no slot became free
            await collect(service, ASK)
        session.callbacks[0](finished())
        while service.running:
            await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(collect(service, ASK)))
        await session.asked(most + 1)
        assert (service.running, service.waiting) == (0, most)
        for on_event in session.callbacks[1:]:
            on_event(finished())
        await asyncio.gather(*tasks)
        assert (service.running, service.waiting) == (0, 0)

    run(work)


@pytest.mark.parametrize(
    ("error", "status"), [(EngineError("no"), 400), (RingError("lost"), 503), (ValueError("ours"), 500)]
)
def test_errors_of_the_engine_are_told(
    service: Service, session: ScriptedSession, error: Exception, status: int
) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, ChatRequest(messages=ASK.messages, n=2)))
        await session.asked(2)
        session.callbacks[1](error)
        with pytest.raises(ApiError) as caught:
            await task
        assert caught.value.status == status
        assert session.cancelled == [1]
        assert "ours" not in caught.value.message
        assert service.waiting == 0

    run(work)


def test_a_lost_ring_is_in_the_log_once(
    service: Service, session: ScriptedSession, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, ChatRequest(messages=ASK.messages, n=2)))
        await session.asked(2)
        lost = Interrupted("rank 1 is lost", 1, 3)
        for event in (lost, Resumed(2.0), finished()):
            for on_event in session.callbacks:
                on_event(event)
        await task

    run(work)
    assert [(each.levelname, each.message) for each in caplog.records if "ring" in each.message] == [
        ("WARNING", "lost the ring: rank 1 is lost (restart 1 of 3)"),
        ("WARNING", "the ring is up again after 2.0 s"),
    ]


def test_a_ring_that_is_given_up_is_logged_once(
    service: Service, session: ScriptedSession, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        tasks = [asyncio.create_task(collect(service, ASK)) for _ in range(2)]
        await session.asked(2)
        error = RingError("rank 1 is lost, 3 times")
        for on_event in session.callbacks:
            on_event(error)
        for told in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(told, ApiError)
            assert (told.status, told.code) == (503, "ring_lost")

    run(work)
    assert [each.message for each in caplog.records] == ["the ring failed for good: rank 1 is lost, 3 times"]


def test_a_lost_ring_is_told_and_survived(service: Service, session: ScriptedSession, tokenizer: ChatTokenizer) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, ASK))
        await session.asked()
        on_event = session.callbacks[0]
        on_event(Interrupted("rank 1 is lost", 1, 3))
        on_event(Resumed(2.0))
        for id in tokenizer.encode("Hi"):
            on_event(Token(id))
        on_event(finished())
        items = await task
        assert items[0] == KeepAlive(reason="rank 1 is lost")
        assert isinstance(items[-1], FinishEvent)

    run(work)


def test_health_says_what_is_wrong(service: Service) -> None:
    assert health_problem(service, SessionStatus(is_up=True, last_step_age_s=500)) is None  # idle
    assert health_problem(service, SessionStatus(is_up=True, active=1, last_step_age_s=5)) is None
    assert (
        health_problem(service, SessionStatus(is_up=True, active=1, last_step_age_s=500))
        == "the last step ended 500 s ago"
    )
    assert health_problem(service, SessionStatus(is_up=False, reason="rank 1 is lost")) == "rank 1 is lost"
    service.close()
    assert health_problem(service, SessionStatus(is_up=True)) == "the server is shutting down"


def test_a_stop_text_withdraws_the_request(
    service: Service, session: ScriptedSession, tokenizer: ChatTokenizer
) -> None:
    async def work() -> None:
        task = asyncio.create_task(
            collect(service, ChatRequest(messages=ASK.messages, thinking=False, stop=("lo th",)))
        )
        await session.asked()
        for id in tokenizer.encode("Hello there, you"):
            session.callbacks[0](Token(id))
        while not session.cancelled:
            await asyncio.sleep(0.001)
        session.callbacks[0](finished("cancelled"))
        *pieces, end = await task
        assert "".join(piece.delta.text for piece in pieces if isinstance(piece, DeltaEvent)) == "Hel"
        assert isinstance(end, FinishEvent)
        assert (end.reason, end.stop_sequence) == ("stop", "lo th")
        assert session.cancelled == [1]

    run(work)


def test_whoever_leaves_withdraws_all_answers(service: Service, session: ScriptedSession) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, ChatRequest(messages=ASK.messages, n=2)))
        await session.asked(2)
        session.callbacks[0](finished())
        while service.waiting == 2:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert session.cancelled == [2]
        assert (service.running, service.waiting) == (0, 0)

    run(work)


def test_the_end_of_the_server_ends_all(service: Service, session: ScriptedSession) -> None:
    async def work() -> None:
        task = asyncio.create_task(collect(service, ASK))
        await session.asked()
        service.close()
        for told in (task, collect(service, ASK)):
            with pytest.raises(ApiError) as caught:
                await told
            assert (caught.value.status, caught.value.code) == (503, "stopping")

    run(work)


def test_seeds_of_several_answers_differ(service: Service, session: ScriptedSession) -> None:
    async def work() -> None:
        asked = ChatRequest(messages=ASK.messages, n=3, sampling={"seed": 2**63 - 1, "temperature": 1.0})
        task = asyncio.create_task(collect(service, asked))
        await session.asked(3)
        assert [request.sampling.seed for request in session.requests] == [2**63 - 1, 0, 1]
        for on_event in session.callbacks:
            on_event(finished())
        await task

    run(work)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_stop_texts_are_found_across_pieces(size: int) -> None:
    for text, stops, shown in (
        ("one two three", ("two",), "one "),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("xyz", ("zz", "yzz"), "xyz"),
        ("first second", ("second", "st"), "fir"),
    ):
        sequences = StopSequences(stops)
        pieces = [sequences.add(text[at : at + size]) for at in range(0, len(text), size)]
        if sequences.matched is None:
            pieces.append(sequences.finish())
        assert "".join(pieces) == shown


def test_what_is_handed_over_after_the_client_has_gone_is_withdrawn(service: Service, session: ScriptedSession) -> None:
    submit, may_go_on = session.submit, threading.Event()

    def slow(request: Request, on_event: EventCallback) -> int:
        number = submit(request, on_event)
        may_go_on.wait(5)
        return number

    session.submit = slow  # pyright: ignore[reportAttributeAccessIssue]

    async def work() -> None:
        task = asyncio.create_task(collect(service, ChatRequest(messages=ASK.messages, n=3)))
        await session.asked()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert service.waiting == 0
        may_go_on.set()
        while not session.cancelled:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert (len(session.requests), session.cancelled) == (1, [1])

    run(work)


def test_a_server_that_ends_does_not_wait_for_the_engine(service: Service, session: ScriptedSession) -> None:
    session.cancel = lambda: None  # pyright: ignore[reportAttributeAccessIssue]

    async def work() -> None:
        task = asyncio.create_task(collect(service, ASK))
        await session.asked()
        service.close()
        with pytest.raises(ApiError, match="shutting down"):
            await task

    run(work)
