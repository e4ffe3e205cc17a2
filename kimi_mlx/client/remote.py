"""A chat model behind a server: ours, or any other with OpenAI's Chat Completions API."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from kimi_mlx.client.address import ServerAddress
from kimi_mlx.client.answer_stream import AnswerStream
from kimi_mlx.client.http import OTHER_SILENCE_S, SILENCE_S, BusyError, EventReader, HttpClient, MissingPathError
from kimi_mlx.client.request_body import chat_body
from kimi_mlx.client.served_model import ServedModel, choose_model, read_models
from kimi_mlx.engine.events import Interrupted
from kimi_mlx.errors import EngineError, KimiMlxError, ServerError, UsageError
from kimi_mlx.session.chat_model import ChatEvent, ChatOptions
from kimi_mlx.session.model_status import ModelStatus
from kimi_mlx.text.media import MediaKind
from kimi_mlx.text.messages import Message

if TYPE_CHECKING:
    from kimi_mlx.images.cache import MediaCache
    from kimi_mlx.images.video import MediaChunk

MAX_BUSY_RETRIES = 5
"""Number of times that a request is sent again to a server whose queue is full."""

DEFAULT_RETRY_S = 5.0
MAX_RETRY_S = 60.0

COUNT_S = 60.0
"""Time in which a server must count the tokens of a prompt: our own prepares a long request within it."""

CHARS_PER_TOKEN = 4
"""Estimate for prompts of servers that do not count tokens."""


class RemoteChatModel:
    """A chat model behind a server. Each answer has a connection of its own, which cancel() cuts.

    Args:
        address: address of the server.
        key: API key; None to send none.
        wanted: name of the model; None for the only one that the server has.

    Raises:
        ServerError: there is no such server, or it refuses the key.
        UsageError: the server does not have the model, or it has several and no name is given.
    """

    def __init__(self, address: ServerAddress, key: str | None = None, wanted: str | None = None):
        self._http = HttpClient(address, key)
        self._model = self._find_model(wanted)
        self._document = self._read_cluster()
        self._can_count = True
        self._is_cancelled = threading.Event()
        self._readers: dict[EventReader, None] = {}

    @property
    def url(self) -> str:
        """Address of the server, for people."""
        return self._http.address.url

    @property
    def name(self) -> str:
        """Name of the model on the server."""
        return self._model.name

    @property
    def context(self) -> int:
        """Maximum number of tokens of a prompt and its answer; 0 if the server does not report it."""
        return self._model.context_tokens

    @property
    def image_error(self) -> KimiMlxError | None:
        """Error of messages with images if the model does not see images; None if it does, or may."""
        if self._model.media is None or "image" in self._model.media:
            return None
        return EngineError(f"`{self.name}` at {self.url} does not see images", hint="use a server whose model does")

    @property
    def can_switch_thinking(self) -> bool:
        """Return True: the server does not report whether its model can."""
        return True

    def generate(self, messages: Sequence[Message], options: ChatOptions) -> Iterator[ChatEvent]:
        """Answer messages; the last event is Finished. A full queue of the server is waited for.

        Raises:
            ServerError: the server refuses the request, or the connection is lost.
        """
        self._is_cancelled.clear()
        body = chat_body(self.name, messages, options) | {"stream": True, "stream_options": {"include_usage": True}}
        if self._model.reports_progress:
            body["return_progress"] = True
        for attempt in range(1, MAX_BUSY_RETRIES + 2):
            try:
                yield from self._stream(body)
                return
            except BusyError as error:
                if attempt > MAX_BUSY_RETRIES:
                    raise
                wait_s = min(error.retry_after_s or DEFAULT_RETRY_S, MAX_RETRY_S)
                yield Interrupted(error.message, attempt, MAX_BUSY_RETRIES, wait_s)
                if self._is_cancelled.wait(wait_s):
                    yield AnswerStream(self.url).cancelled()
                    return

    def count_tokens(self, messages: Sequence[Message], options: ChatOptions) -> int:
        """Return the number of tokens of the prompt; an estimate if the server cannot count them."""
        body = chat_body(self.name, messages, options)
        if self._can_count:
            try:
                return max(0, int(self._http.post("/chat/completions/input_tokens", body, COUNT_S)["input_tokens"]))
            except (MissingPathError, KeyError, TypeError, ValueError):
                self._can_count = False
        return len(json.dumps(body["messages"], ensure_ascii=False)) // CHARS_PER_TOKEN

    def prepare_media(self, kind: MediaKind, source: str | bytes, place: str) -> Sequence[MediaChunk]:
        """Return an image as one chunk, or the chunks of a video, as the server's model sees them, else Kimi K2.5."""
        return self._media_cache.prepare(kind, source, place)

    def recommended_sampling(self, options: ChatOptions) -> Mapping[str, float | int]:
        """Return the server's sampling parameters of answers whose options set none; empty if unknown."""
        instant = self._numbers("instant_sampling") if options.thinking is False else {}
        return {**self._numbers("sampling"), **instant}

    def status(self) -> ModelStatus:
        """Return what runs where, as the server reports it now; only the name and the context for other servers.

        Raises:
            ServerError: the server does not answer.
        """
        self._document = self._read_cluster()
        known = {"model": self.name, "context_tokens": self.context, **self._document, "url": self.url}
        try:
            return ModelStatus.from_dict(known)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            hint = "install the same version of kimi-mlx on both machines"
            raise ServerError(f"the status of {self.url} cannot be read", hint=hint) from error

    def cancel(self) -> None:
        """Cancel all answers: the server notices at once that their connections are closed."""
        self._is_cancelled.set()
        for reader in list(self._readers):
            reader.close()

    def reset(self) -> None:
        """Do nothing: the server's caches belong to all of its clients."""

    def close(self) -> None:
        """Cancel all answers."""
        self.cancel()

    @cached_property
    def _media_cache(self) -> MediaCache:
        from kimi_mlx.images.cache import MediaCache  # imports PIL, which text does not need
        from kimi_mlx.images.preprocessing import Preprocessing

        settings = self._numbers("preprocessing")
        known: dict[str, Any] = {
            item.name: settings[item.name] for item in fields(Preprocessing) if item.name in settings
        }
        return MediaCache(Preprocessing(**known))

    def _numbers(self, field: str) -> dict[str, float | int]:
        """Return the numbers, by name, in a field of the server's document; empty if it has none."""
        values: Any = self._document.get(field)
        items = cast("dict[str, Any]", values).items() if isinstance(values, dict) else ()
        return {name: value for name, value in items if isinstance(value, int | float)}

    def _find_model(self, wanted: str | None) -> ServedModel:
        """Return the model to chat with."""
        try:
            answer = self._http.get("/models")
        except MissingPathError:
            if wanted is None:
                message = f"{self.url} does not list its models"
                hint = f"name the model: `kimi-mlx chat NAME --url {self.url}`, or check the address"
                raise UsageError(message, hint=hint) from None
            return ServedModel(wanted)
        return choose_model(read_models(answer, self.url), wanted, self.url)

    def _read_cluster(self) -> Mapping[str, Any]:
        """Return the document of GET /cluster; an empty one if the server has none."""
        if not self._model.is_ours:
            return {}
        try:
            document: Any = self._http.get("/cluster")
        except MissingPathError:  # an earlier version
            return {}
        return cast("dict[str, Any]", document) if isinstance(document, dict) else {}

    def _stream(self, body: Mapping[str, Any]) -> Iterator[ChatEvent]:
        """Yield the events of one request."""
        answer = AnswerStream(self.url)
        silence_s = SILENCE_S if self._model.is_ours else OTHER_SILENCE_S
        reader = self._http.open_stream("/chat/completions", body, silence_s)
        self._readers[reader] = None
        try:
            if self._is_cancelled.is_set():
                reader.close()
            while (data := reader.take()) is not None:
                yield from answer.add(data)
            if reader.is_closed:
                yield answer.cancelled()
            else:
                yield from answer.finish()
        finally:
            reader.close()
            del self._readers[reader]
