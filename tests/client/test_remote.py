"""Chats with a server: the same messages as with a model of this process, and everything that can fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import pytest

from kimi_mlx.client.address import parse_address
from kimi_mlx.client.remote import RemoteChatModel
from kimi_mlx.engine.events import Finished, Interrupted, Prefilled
from kimi_mlx.errors import EngineError, KimiMlxError, ServerError, UsageError
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.http.security import Security
from kimi_mlx.server.server import ServingOptions
from kimi_mlx.session.chat_model import ChatEvent, ChatModel, ChatOptions
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.session.local_chat_model import LocalChatModel
from kimi_mlx.session.session import Session
from kimi_mlx.text.messages import Delta, Message, ToolCall
from tests.fakes import KIMI_MINI, FixedSession
from tests.server.running_server import RunningServer, serving, wait_until

GREEDY = ChatOptions(sampling={"temperature": 0})
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def talk(model: ChatModel, options: ChatOptions, messages: Sequence[str]) -> Conversation:
    """Return a conversation after some messages; each tool call gets a result."""
    conversation = Conversation(model, options, "Be brief.")
    for message in messages:
        finished = [event for event in conversation.ask(message) if isinstance(event, Finished)]
        assert len(finished) == 1
        calls = [call for call in conversation.messages[-1].tool_calls if isinstance(call, ToolCall)]
        for call in calls:
            conversation.add_tool_result(call, '{"temperature": 21}')
        if calls:
            list(conversation.answer())
    return conversation


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        pytest.param(GREEDY, ["What are you?", "Tell me more.", "数を三つ数えて 🎈"], marks=pytest.mark.slow),
        pytest.param(replace(GREEDY, template_kwargs={"thinking": False}), ["What are you?"], marks=pytest.mark.slow),
        pytest.param(replace(GREEDY, template_kwargs={"thinking": True}), ["What is 2 + 3?"], marks=pytest.mark.slow),
        (replace(GREEDY, tools=[WEATHER]), ["What is the weather in Paris?"]),
        pytest.param(
            replace(GREEDY, tools=[WEATHER], tool_choice={"name": "get_weather"}), ["Hello"], marks=pytest.mark.slow
        ),
        pytest.param(
            replace(GREEDY, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False),
            ["Hello"],
            marks=pytest.mark.slow,
        ),
        (replace(GREEDY, max_tokens=3), ["What are you?"]),
        (
            replace(
                GREEDY, response_schema={"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
            ),
            ["Choose"],
        ),
        pytest.param(replace(GREEDY, response_schema=True, max_tokens=12), ["Choose"], marks=pytest.mark.slow),
        (
            ChatOptions(
                sampling={"temperature": 1, "seed": 7, "top_p": 0.9, "top_k": 20, "min_p": 0.01}, max_tokens=30
            ),
            ["A story"],
        ),
    ],
)
def test_conversations_equal_those_of_a_local_model(
    local: LocalChatModel, remote: RemoteChatModel, options: ChatOptions, messages: list[str]
) -> None:
    assert talk(remote, options, messages).messages == talk(local, options, messages).messages


def test_counts_sampling_and_context_equal_those_of_a_local_model(
    local: LocalChatModel, remote: RemoteChatModel
) -> None:
    messages = [Message("system", "Be brief."), Message("user", "What are you?")]
    for options in (GREEDY, replace(GREEDY, tools=[WEATHER]), ChatOptions(template_kwargs={"thinking": False})):
        assert remote.count_tokens(messages, options) == local.count_tokens(messages, options)
        expected = {name: value for name, value in local.recommended_sampling(options).items() if value is not None}
        assert remote.recommended_sampling(options) == expected
    assert (remote.context, remote.name) == (local.context, "kimi-mini")
    assert isinstance(remote.image_error, EngineError)


def test_progress_and_statistics(remote: RemoteChatModel) -> None:
    long = "word " * 300
    events = list(remote.generate([Message("user", long)], replace(GREEDY, max_tokens=5)))
    progress = [event for event in events if isinstance(event, Prefilled)]
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.reason == "length"
    assert [event.total for event in progress] == [finished.statistics.prompt_tokens] * len(progress)
    assert len(progress) >= 2
    assert progress[-1].done == progress[-1].total
    assert finished.statistics.generated_tokens == 5
    assert finished.statistics.ttft_s > 0 < finished.statistics.decode_tok_per_s
    assert finished.statistics.peak_memory_bytes > 0


def test_status_is_that_of_the_server(remote: RemoteChatModel, running: RunningServer) -> None:
    status = remote.status()
    assert (status.url, status.model, status.context_tokens) == (running.url, "kimi-mini", remote.context)
    assert [rank.share for rank in status.ranks] == ["the whole model"]
    assert status.is_up


def test_names_of_the_model(running: RunningServer) -> None:
    address = parse_address(running.url)
    assert RemoteChatModel(address, wanted="mini").name == "kimi-mini"
    with pytest.raises(UsageError, match="does not serve `kimi-k2`") as caught:
        RemoteChatModel(address, wanted="kimi-k2")
    assert caught.value.hint == "it serves `kimi-mini`"


def test_keys(session: Session) -> None:
    options = ServingOptions(Security("127.0.0.1", ("secret",)))
    with serving(session, options) as server:
        address = parse_address(server.url)
        assert RemoteChatModel(address, "secret").name == "kimi-mini"
        for key, message in ((None, "needs an API key"), ("wrong", "refuses this API key")):
            with pytest.raises(ServerError, match=message) as caught:
                RemoteChatModel(address, key)
            assert "--api-key-file" in (caught.value.hint or "")


def endless_server(pause_s: float = 0.01) -> FixedSession:
    ids = ChatTokenizer.load(KIMI_MINI).encode("Hello ")
    return FixedSession(ids, pause_s=pause_s, is_endless=True)


def test_cancel_ends_the_answer_here_and_on_the_server() -> None:
    session = endless_server()
    with serving(session) as server, closing(RemoteChatModel(parse_address(server.url))) as model:
        events: list[ChatEvent] = []
        for event in model.generate([Message("user", "Hello")], GREEDY):
            events.append(event)
            if len(events) == 10:
                model.cancel()
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert finished.reason == "cancelled"
        server.wait_idle(2)
        assert list(model.generate([Message("user", "Hello")], replace(GREEDY, max_tokens=2)))[-1]  # works again


def test_cancel_from_another_thread_wakes_a_waiting_reader() -> None:
    """As a signal handler does while the main thread waits for a server that sends nothing."""
    session = endless_server(pause_s=60)
    with serving(session) as server, closing(RemoteChatModel(parse_address(server.url))) as model:
        timer = threading.Timer(0.3, model.cancel)
        timer.start()
        start = time.monotonic()
        last = list(model.generate([Message("user", "Hello")], GREEDY))[-1]
        assert isinstance(last, Finished)
        assert last.reason == "cancelled"
        assert time.monotonic() - start < 3
        wait_until(lambda: not server.server.service.running, 3)


def test_closing_the_iterator_cancels_on_the_server() -> None:
    with serving(endless_server()) as server, closing(RemoteChatModel(parse_address(server.url))) as model:
        conversation = Conversation(model)
        answer = conversation.ask("Hello")
        assert any(isinstance(event, Delta) for event in answer)
        answer.close()
        server.wait_idle(2)


def test_a_server_that_shuts_down_in_mid_answer_leaves_the_text() -> None:
    with serving(endless_server()) as server, closing(RemoteChatModel(parse_address(server.url))) as model:
        conversation = Conversation(model)
        answer = conversation.ask("Hello")
        assert any(isinstance(event, Delta) for event in answer)
        server.server.should_exit = True
        with pytest.raises(ServerError, match="shutting down") as caught:
            list(answer)
        assert "start it again" in (caught.value.hint or "")
        assert str(conversation.messages[-1].reasoning_content).startswith("Hello")
    with pytest.raises(ServerError, match=r"cannot connect to http://127\.0\.0\.1:\d+: .*refused"):
        list(conversation.ask("Hello"))


def test_a_full_queue_is_waited_for() -> None:
    session = endless_server()
    with serving(session, ServingOptions(max_queue=1)) as server:
        queue = server.server.service._queue
        with closing(RemoteChatModel(parse_address(server.url))) as model:
            queue.waiting = 100  # as if it were busy
            events = model.generate([Message("user", "Hello")], replace(GREEDY, max_tokens=2))
            busy = next(iter(events))
            assert isinstance(busy, Interrupted)
            assert "is busy" in busy.reason
            assert busy.wait_s == 1
            queue.waiting = 0
            assert isinstance(list(events)[-1], Finished)
            queue.waiting = 100
            events = model.generate([Message("user", "Hello")], GREEDY)
            next(iter(events))
            model.cancel()
            assert [event.reason for event in events if isinstance(event, Finished)] == ["cancelled"]
            queue.waiting = 0


@pytest.mark.slow
def test_two_chats_at_once(running: RunningServer, local: LocalChatModel) -> None:
    questions = ["What are you?", "Tell me a story"]
    expected = [talk(local, GREEDY, [question]).messages for question in questions]
    results: dict[int, list[Message]] = {}

    def chat(index: int) -> None:
        with closing(RemoteChatModel(parse_address(running.url))) as model:
            results[index] = talk(model, GREEDY, [questions[index]]).messages

    threads = [threading.Thread(target=chat, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [results[0], results[1]] == expected


def test_a_prompt_that_does_not_fit_is_refused(session: Session) -> None:
    with serving(session, context_tokens=100) as server, closing(RemoteChatModel(parse_address(server.url))) as model:
        conversation = Conversation(model)
        with pytest.raises(KimiMlxError, match="maximum context length is 100 tokens"):
            list(conversation.ask("word " * 500))
        assert conversation.messages == []
