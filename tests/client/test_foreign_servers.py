"""Chats with servers that are not ours, well-behaved and not."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.client import http
from kimi_mlx.client.address import parse_address
from kimi_mlx.client.remote import RemoteChatModel
from kimi_mlx.engine.events import Finished, Prefilled
from kimi_mlx.errors import ServerError, UsageError
from kimi_mlx.session.chat_model import ChatEvent, ChatOptions
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.text.messages import Delta, Message, ToolCall, UnparsedToolCall, join
from tests.client.foreign_server import MODELS, ForeignServer, Reply, delta, events, foreign_server

PNG = b"\x89PNG\r\n"


def connect(server: ForeignServer, **arguments: Any) -> RemoteChatModel:
    return RemoteChatModel(parse_address(server.url), **arguments)


def answer(model: RemoteChatModel, options: ChatOptions | None = None) -> tuple[Delta, Finished]:
    received: list[ChatEvent] = list(model.generate([Message("user", "Hello")], options or ChatOptions()))
    finished = received[-1]
    assert isinstance(finished, Finished)
    return join(event for event in received if isinstance(event, Delta)), finished


def test_a_plain_answer_and_what_is_sent() -> None:
    chunks = [
        delta(role="assistant", content=""),
        delta(reasoning="Hm. "),
        delta(content="Hel"),
        delta(content="lo", reasoning_content=None),
        delta("stop"),
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}},
    ]
    with foreign_server(events(*chunks)) as server:
        model = connect(server)
        text, finished = answer(model, ChatOptions(max_tokens=9, sampling={"temperature": 0.5, "seed": 1}))
        assert (text.text, text.reasoning, finished.reason) == ("Hello", "Hm. ", "stop")
        statistics = finished.statistics
        assert (statistics.prompt_tokens, statistics.generated_tokens, statistics.cached_tokens) == (7, 5, 0)
        assert server.body == {
            "model": "other-model",
            "messages": [{"role": "user", "content": "Hello"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 9,
            "temperature": 0.5,
            "seed": 1,
        }
        assert (model.context, model.image_error, model.recommended_sampling(ChatOptions())) == (0, None, {})
        status = model.status()
        assert (status.model, status.url, list(status.ranks)) == ("other-model", server.url, [])


def test_all_options_have_the_form_of_openai() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    options = ChatOptions(
        tools=[tool],
        tool_choice={"name": "look"},
        parallel_tool_calls=False,
        response_schema={"type": "object"},
        template_kwargs={"thinking": False},
    )
    image = [{"type": "image", "image": PNG}, {"type": "text", "text": "?"}]
    call = ToolCall("c1", "look", "{}")
    messages = [
        Message("user", image),
        Message("assistant", "", "Hm.", [call]),
        Message("tool", "seen", tool_call_id="c1"),
    ]
    with foreign_server(events(delta("stop"))) as server:
        list(connect(server).generate(messages, options))
        body = server.body
    assert body["tools"] == [tool]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert body["parallel_tool_calls"] is False
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert body["chat_template_kwargs"] == {"thinking": False}
    url = {"url": "data:image/png;base64,iVBORw0K"}
    assert body["messages"][0]["content"] == [{"type": "image_url", "image_url": url}, image[1]]
    assert body["messages"][1]["tool_calls"] == [call.to_dict()]
    assert body["messages"][2]["tool_call_id"] == "c1"


def test_progress_and_times_of_llama_cpp() -> None:
    progress = [
        delta(role="assistant", content=None) | {"prompt_progress": {"total": 9, "cache": 1, "processed": done}}
        for done in (1, 5, 9)
    ]
    timings = {"cache_n": 1, "prompt_n": 8, "prompt_ms": 400.0, "predicted_n": 3, "predicted_ms": 100.0}
    models = Reply.from_json({"data": [{"id": "m.gguf", "owned_by": "llamacpp", "meta": {"n_ctx_train": 4096}}]})
    with foreign_server(events(*progress, delta("length", content="x") | {"timings": timings}), models) as server:
        model = connect(server)
        assert model.context == 4096
        received = list(model.generate([Message("user", "Hello")], ChatOptions()))
        assert server.body["return_progress"] is True
    assert [event for event in received if isinstance(event, Prefilled)] == [
        *(Prefilled(done, 9) for done in (1, 5, 9)),
    ]
    finished = received[-1]
    assert isinstance(finished, Finished)
    statistics = finished.statistics
    assert finished.reason == "length"
    assert (statistics.prompt_tokens, statistics.cached_tokens, statistics.ttft_s) == (9, 1, 0.4)
    assert (statistics.generated_tokens, statistics.prefill_tok_per_s) == (3, 20)


def part(index: int | None, arguments: str, name: str | None = None, id: str | None = None) -> dict[str, Any]:
    fields: dict[str, Any] = {"function": {"arguments": arguments} | ({"name": name} if name else {})}
    fields |= {"id": id} if id else {}
    return fields | ({} if index is None else {"index": index})


@pytest.mark.parametrize(
    ("parts", "calls"),
    [
        (
            [part(0, "", "a", "c1"), part(0, '{"x":'), part(0, "1}"), part(1, "{}", "b", "c2")],
            (ToolCall("c1", "a", '{"x":1}'), ToolCall("c2", "b", "{}")),
        ),
        ([part(0, "", "a", "c1")], (ToolCall("c1", "a", "{}"),)),
        ([part(0, "{}", "a")], (ToolCall("functions.a:0", "a", "{}"),)),
        ([part(None, "{}", "a", "c1")], (ToolCall("c1", "a", "{}"),)),
    ],
)
def test_tool_calls_in_several_forms(parts: list[dict[str, Any]], calls: tuple[ToolCall, ...]) -> None:
    chunks = [delta(tool_calls=[item]) for item in parts]
    with foreign_server(events(*chunks, delta("tool_calls"))) as server:
        text, finished = answer(connect(server))
    assert (text.tool_calls, finished.reason) == (calls, "stop")
    assert len(text.tool_call_deltas) == len(calls)


def test_a_call_with_broken_arguments_is_no_call() -> None:
    with foreign_server(events(delta(tool_calls=[part(0, '{"x":', "a", "c1")]), delta("length"))) as server:
        (call,) = answer(connect(server))[0].tool_calls
    assert isinstance(call, UnparsedToolCall)
    assert "not JSON" in call.reason


HELLO = 'data: {"choices": [{"index": 0, "delta": {"content": "Hello"}}]}\n\n'


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply([HELLO], is_cut=True), "lost the connection to"),
        (Reply([HELLO]), "closed the connection before the answer ended"),
        (Reply([HELLO, 'data: {"error": {"message": "out of memory", "code": 500}}\n\n']), "out of memory"),
        (Reply([HELLO, 'data: {"error": "just text"}\n\n']), "just text"),
        (Reply([HELLO, "data: {nonsense\n\n"]), "cannot be understood"),
        (Reply([HELLO, "data: [1]\n\n"]), "cannot be understood"),
        (Reply([HELLO, 'data: {"choices": [7]}\n\n']), "cannot be understood"),
        (Reply([HELLO, f"data: {'[' * 900}\n\n"]), "cannot be understood"),
        (Reply([HELLO, 'data: {"usage": 5}\n\n']), "cannot be understood"),
        (Reply([HELLO, 'data: {"usage": {"prompt_tokens": 1e999}}\n\n']), "cannot be understood"),
        (Reply([HELLO, 'data: {"timings": {"prompt_ms": NaN}}\n\n']), "cannot be understood"),
        (Reply([HELLO, 3.0]), "nothing came from"),
        (Reply([HELLO, "data: " + "x" * 3000]), "does not answer as an API server"),
    ],
)
def test_an_answer_that_breaks_off_keeps_its_text(reply: Reply, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_mlx.client.remote.OTHER_SILENCE_S", 0.5 if message.startswith("nothing") else 30)
    monkeypatch.setattr(http, "MAX_EVENT_BYTES", 2000)
    with foreign_server(reply) as server:
        conversation = Conversation(connect(server))
        with pytest.raises(ServerError, match=message) as caught:
            list(conversation.ask("Hi"))
    assert caught.value.hint
    assert [message.content for message in conversation.messages] == ["Hi", "Hello"]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply.from_json({"error": {"message": "unknown parameter"}}, 400), "unknown parameter"),
        (Reply.from_json({"detail": "no"}, 422), "no"),
        (Reply.from_json({"error": "model not found"}, 404), "model not found"),
        (Reply(["<html>Bad gateway</html>"], 502, {"content-type": "text/html"}), "status 502 Bad Gateway"),
        (Reply([], 307, {"location": "https://elsewhere/"}), "has moved to https://elsewhere/"),
        (Reply.from_json({"object": "chat.completion"}), "does not answer as an API server"),
    ],
)
def test_refused_requests(reply: Reply, message: str) -> None:
    with foreign_server(reply) as server:
        conversation = Conversation(connect(server))
        with pytest.raises(ServerError, match=message):
            list(conversation.ask("Hi"))
    assert conversation.messages == []


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_mlx.client.remote.DEFAULT_RETRY_S", 0.01)
    busy = Reply.from_json({"error": {"message": "rate limit"}}, 429)
    later = Reply.from_json({}, 429, **{"retry-after": "0.01"})
    with foreign_server([busy, later, events(delta("stop", content="Hi"))]) as server:
        assert answer(connect(server))[0].text == "Hi"
    with foreign_server(busy) as server:
        with pytest.raises(ServerError, match="is busy: rate limit"):
            answer(connect(server))
        assert len([path for path, _ in server.requests if path.endswith("completions")]) == 6


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (Reply(["<html>"], headers={"content-type": "text/html"}), "does not answer as an API server"),
        (Reply.from_json({"models": []}), "does not answer with a list of models"),
        (Reply.from_json([1]), "does not answer with a list of models"),
        (Reply.from_json({"data": [{"id": "x", "context_length": "big"}]}), "does not answer with a list of models"),
        (Reply(['{"data": [{"id": "x", "context_length": 1e999}]}']), "does not answer as an API server"),
        (Reply(["[" * 10_000]), "does not answer as an API server"),
        (Reply([" " * 1000] * 20), "does not answer as an API server"),
        (Reply([" ", 0.1] * 50), "nothing came from"),
        (Reply([" " * 1000] * 20, 500), "status 500"),
        (Reply.from_json({"data": []}), "serves no model"),
        (Reply.from_json({"error": {"message": "boom"}}, 500), "boom"),
    ],
)
def test_servers_that_are_no_api(models: Reply, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REPLY_S", 0.5 if message.startswith("nothing") else 30)
    monkeypatch.setattr(http, "MAX_REPLY_BYTES", 10_000)
    monkeypatch.setattr(http, "MAX_ERROR_BYTES", 10_000)
    with foreign_server(models=models) as server, pytest.raises(ServerError, match=message):
        connect(server)


def test_the_model_is_named_where_it_must_be() -> None:
    several = Reply.from_json({"data": [{"id": f"m{number}"} for number in range(12)]})
    with foreign_server(models=several) as server:
        with pytest.raises(UsageError, match=r"serves 12 models: `m0`.* and 2 more") as caught:
            connect(server)
        assert f"kimi-mlx chat m0 --url {server.url}" in (caught.value.hint or "")
        assert connect(server, wanted="m11").name == "m11"
    with foreign_server(models=Reply.from_json({}, 404)) as server:
        with pytest.raises(UsageError, match="does not list its models"):
            connect(server)
        assert connect(server, wanted="mine").name == "mine"


def test_tokens_are_counted_or_estimated() -> None:
    messages = [Message("user", "x" * 400)]
    with foreign_server(chat_completions_input_tokens=Reply.from_json({"input_tokens": 17})) as server:
        assert connect(server).count_tokens(messages, ChatOptions()) == 17
    for other in (Reply.from_json({}, 404), Reply.from_json({"tokens": 1})):
        with foreign_server(chat_completions_input_tokens=other) as server:
            model = connect(server)
            assert 100 <= model.count_tokens(messages, ChatOptions()) <= 120
            num_requests = len(server.requests)
            model.count_tokens(messages, ChatOptions())
            assert len(server.requests) == num_requests  # it is not asked again


def test_a_server_waits_for_a_reader_that_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_WAITING_EVENTS", 3)
    with foreign_server(Reply([HELLO * 100, "data: [DONE]\n\n"])) as server:
        assert answer(connect(server))[0].text == "Hello" * 100
        model = connect(server)
        events = model.generate([Message("user", "Hi")], ChatOptions())
        next(events)
        model.cancel()  # also while the reader's thread waits
        assert [type(event) for event in events][-1] is Finished


def test_what_a_server_says_of_sampling_may_be_anything() -> None:
    models = Reply.from_json({"data": [{"id": "x", "owned_by": "kimi-mlx"}]})
    for sampling in ("abc", [1], {"temperature": "x", "top_p": 0.5}):
        with foreign_server(models=models, cluster=Reply.from_json({"sampling": sampling})) as server:
            assert connect(server).recommended_sampling(ChatOptions()) in ({}, {"top_p": 0.5})


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    file, key = folder / "certificate.pem", folder / "key.pem"
    name = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    command = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *name)
    subprocess.run([*command, "-keyout", key, "-out", file], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return file, context


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https_and_its_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, context = certificate(tmp_path)
    with foreign_server(events(delta("stop", content="Hi")), MODELS, context) as server:
        with pytest.raises(ServerError, match="certificate is not trusted") as caught:
            connect(server)
        assert "SSL_CERT_FILE" in (caught.value.hint or "")
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        model = connect(server)
        assert answer(model)[0].text == "Hi"
        received = model.generate([Message("user", "Hello")], ChatOptions())
        next(iter(received))
        model.cancel()
        finished: Sequence[ChatEvent] = list(received)
        assert re.match("cancelled|stop", getattr(finished[-1], "reason", ""))
    with foreign_server() as server, pytest.raises(ServerError):
        RemoteChatModel(parse_address(server.url.replace("http", "https")))


def test_a_request_that_is_cancelled_while_it_connects_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[socket.socket] = []
    trace = http._Sockets.trace

    def cut_when_connected(self: http._Sockets, event: str, info: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            opened.append(info["return_value"].get_extra_info("socket"))
            self.cut()
        trace(self, event, info)

    monkeypatch.setattr(http._Sockets, "trace", cut_when_connected)
    with foreign_server(events(delta("stop"))) as server:
        reader = http.HttpClient(parse_address(server.url), None).open_stream("/chat/completions", {}, 60)
        with pytest.raises(ServerError, match="lost the connection"):
            reader.take()
    assert [used.fileno() for used in opened] == [-1]
