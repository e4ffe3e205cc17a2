"""A server, from its parts; how it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import uvicorn

from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.app import build_app
from kimi_mlx.server.http.context import Context
from kimi_mlx.server.http.protocol import TimeoutProtocol
from kimi_mlx.server.http.security import Security
from kimi_mlx.server.metrics import Metrics
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.prompts import PromptBuilder
from kimi_mlx.server.service import Service
from kimi_mlx.session.session import Session
from kimi_mlx.units import MB

KEEP_ALIVE_S = 75
"""For connections without a request: longer than clients keep them."""

END_LIMIT_S = 10
"""For clients to take the end of their answers."""


@dataclass(frozen=True)
class ServingOptions:
    """How to serve.

    Args:
        security: who may ask.
        max_queue: answers that may wait.
        max_body_bytes: of a request.
        log_prompts: whether the log shows bodies.
    """

    security: Security = field(default_factory=Security)
    max_queue: int = 64
    max_body_bytes: int = 32 * MB
    log_prompts: bool = False


class Server(uvicorn.Server):
    """Serves a model until it is told to end: `run([socket])`.

    Args:
        session: the loaded model.
        tokenizer: its text side.
        served: its names.
        instant_sampling: values of Sampling that are recommended where it does not think.
        options: how.
        when_ready: called as soon as it answers.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: ChatTokenizer,
        model_info: ModelInfo,
        instant_sampling: Mapping[str, float],
        options: ServingOptions,
        when_ready: Callable[[], None] = lambda: None,
    ):
        self._when_ready = when_ready
        model_info = replace(model_info, context_tokens=min(model_info.context_tokens, session.context))
        model = PromptBuilder(tokenizer, model_info.context_tokens, instant_sampling)
        self.service = Service(session, model, options.max_queue, Metrics())
        app = build_app(
            Context(self.service, model_info),
            options.security,
            options.max_body_bytes,
            log_prompts=options.log_prompts,
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
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=END_LIMIT_S,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_is_news)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin."""
        await super().startup(sockets)
        self._when_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the answers, then wait until their clients have taken the ends."""
        self.service.close()
        await super().shutdown(sockets)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line is worth writing: requests that are cut off when the server ends are no mistakes."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
