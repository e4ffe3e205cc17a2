"""The HTTP server: assembly, start and shutdown."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import uvicorn

from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.app import build_app
from kimi_mlx.server.http.context import Context
from kimi_mlx.server.http.protocol import TimeoutProtocol
from kimi_mlx.server.http.security import Security
from kimi_mlx.server.media import supported_media
from kimi_mlx.server.metrics import Metrics
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.prompts import PromptBuilder
from kimi_mlx.server.remote_images import ImageFetcher
from kimi_mlx.server.service import MAX_WAIT_S, Service
from kimi_mlx.session.model_status import ModelDeployment
from kimi_mlx.session.session import Session
from kimi_mlx.units import MB

IDLE_CONNECTION_S = 75
"""Time after which an idle connection is closed; longer than clients keep theirs, so that they close first."""

SHUTDOWN_S = 10
"""Time for clients to receive the ends of their answers."""


@dataclass(frozen=True)
class ServingOptions:
    """Options of the server.

    Args:
        security: access rules.
        max_queue: maximum number of answers that wait for the engine.
        max_wait_s: longest time that an answer waits for the engine.
        max_body_bytes: size limit of a request's body, and of all images together that it names by URL.
        image_hosts: hosts from which images are fetched, from `normalize_host`.
        log_prompts: whether request bodies are logged.
        has_page: whether the web page is served at `/`.
        keep_responses: maximum number of responses of the Responses API that are kept in memory.
        starts_worker: whether a worker process for long requests is started with the server, before one is needed.
        constrains_arguments: whether the schemas of tools are enforced in the arguments of calls.
    """

    security: Security = field(default_factory=Security)
    max_queue: int = 1024
    max_wait_s: float = MAX_WAIT_S
    max_body_bytes: int = 64 * MB
    image_hosts: tuple[str, ...] = ()
    log_prompts: bool = False
    has_page: bool = True
    keep_responses: int = 256
    starts_worker: bool = False
    constrains_arguments: bool = True


class Server(uvicorn.Server):
    """Serves a model until `should_exit` is set, which SIGINT, SIGTERM and SIGHUP do; start it with `run([socket])`.

    Args:
        session: session with the loaded model.
        tokenizer: tokenizer with the chat template.
        model_info: names and properties of the model.
        instant_sampling: recommended sampling values, by name of the field, for answers without thinking.
        deployment: the model and its hosts.
        options: options of the server.
        on_ready: callback, called when the server starts to answer.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: ChatTokenizer,
        model_info: ModelInfo,
        instant_sampling: Mapping[str, float],
        deployment: ModelDeployment,
        options: ServingOptions,
        on_ready: Callable[[], None] = lambda: None,
    ):
        self._on_ready, self._starts_worker = on_ready, options.starts_worker
        self._worker_start: asyncio.Task[None] | None = None
        context_tokens = min(model_info.context_tokens, session.context)
        media = supported_media() if session.image_error is None else ()
        model_info = replace(model_info, context_tokens=context_tokens, media=media)
        error = session.image_error
        reason = error and f"{error.message} ({error.hint})"
        prompt_builder = PromptBuilder(
            tokenizer, model_info.context_tokens, instant_sampling, reason, options.constrains_arguments
        )
        fetcher = ImageFetcher(options.image_hosts, options.max_body_bytes)
        self.service = Service(session, prompt_builder, options.max_queue, Metrics(), fetcher, options.max_wait_s)
        app = build_app(
            Context(self.service, model_info, deployment, options.keep_responses),
            options.security,
            options.max_body_bytes,
            log_prompts=options.log_prompts,
            has_page=options.has_page,
        )
        config = uvicorn.Config(
            app,
            http=TimeoutProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_CONNECTION_S,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_is_relevant)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Shut down at SIGHUP as at SIGINT and SIGTERM, unless it is ignored, as after `nohup`."""
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            with super().capture_signals():
                yield
            return
        original_handler = signal.signal(signal.SIGHUP, self.handle_exit)
        try:
            with super().capture_signals():
                yield
        finally:
            signal.signal(signal.SIGHUP, original_handler)
        if signal.SIGHUP in self._captured_signals:
            signal.raise_signal(signal.SIGHUP)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to answer requests."""
        await super().startup(sockets)
        if self._starts_worker:
            self._worker_start = asyncio.create_task(self.service.start_worker())
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all answers, then wait until clients have received them."""
        self.service.close()
        # in a thread, because it waits while a ring restarts
        asyncio.get_running_loop().run_in_executor(None, self.service.session.cancel_all)
        await super().shutdown(sockets)


def _is_relevant(record: logging.LogRecord) -> bool:
    """Drop log records of requests that the shutdown cancelled."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
