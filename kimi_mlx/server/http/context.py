"""Context of the routes of all APIs: the service, the model's names, and the steps from a body to a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from kimi_mlx.server.api_types import ChatRequest, CompletionRequest
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.access_log import RECORD_KEY, RequestRecord
from kimi_mlx.server.http.security import CLIENT_KEY
from kimi_mlx.server.http.sse import ApiFormatter, respond, while_connected
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.preparation import Result, Work
from kimi_mlx.server.prompts import PreparedRequest, PromptBuilder
from kimi_mlx.server.service import Service
from kimi_mlx.session.model_status import ModelDeployment

MAX_PROMPT_TOKENS = 1_000_000
"""Maximum number of tokens of all prompts of one request."""


@dataclass(frozen=True)
class Context:
    """Objects that all routes use.

    Args:
        service: service that answers requests.
        model_info: names and properties of the model.
        deployment: the model and its hosts.
        keep_responses: maximum number of responses of the Responses API that are kept in memory.
    """

    service: Service
    model_info: ModelInfo
    deployment: ModelDeployment
    keep_responses: int = 0

    async def prepare(
        self, request: Request, work: Work[Result], extend: Callable[[bytes], bytes] = lambda body: body
    ) -> Result:
        """Read and record the body of a request, and prepare it.

        Args:
            request: request.
            work: function that prepares it.
            extend: function that returns the body to prepare for the one that was sent.

        Raises:
            ApiError: the body is invalid, or the server is shutting down.
            ClientDisconnectedError: the client has disconnected.
        """
        with self.service.until_closing():
            body = await request.body()
            record: RequestRecord = request.scope[RECORD_KEY]
            record.body = body
            return await while_connected(request.receive, self.service.prepare(work, extend(body)))

    async def answer(self, request: Request, read: ReadCall) -> Response:
        """Return the response to a request that the model answers.

        Args:
            request: request.
            read: function of its API that reads the body.

        Raises:
            ApiError: the request cannot be served.
            ClientDisconnectedError: the client has disconnected.
        """
        call = await self.prepare(request, partial(prepare_call, read, self.model_info))
        events = self.service.answer(*call.requests, client=request.scope[CLIENT_KEY])
        return await respond(request, events, call.formatter, is_stream=call.is_stream)


@dataclass(frozen=True)
class ApiCall:
    """The content of a body.

    Args:
        requests: requests to the model.
        formatter: formatter of the answers.
        is_stream: whether the answers are streamed.
    """

    requests: Sequence[ChatRequest | CompletionRequest]
    formatter: ApiFormatter
    is_stream: bool


@dataclass(frozen=True)
class PreparedCall:
    """The content of a body, ready for the engine."""

    requests: Sequence[PreparedRequest]
    formatter: ApiFormatter
    is_stream: bool


ReadCall = Callable[[PromptBuilder, ModelInfo, bytes], ApiCall]
"""Reads the body of one kind of request; a function of a module, so that it can be pickled."""


def prepare_call(read: ReadCall, model_info: ModelInfo, prompt_builder: PromptBuilder, body: bytes) -> PreparedCall:
    """Read a body and prepare its requests.

    Raises:
        ApiError: the body is invalid, or its requests can never be served.
    """
    call = read(prompt_builder, model_info, body)
    prepared: list[PreparedRequest] = []
    num_tokens = 0
    for request in call.requests:
        prepared.append(prompt_builder.prepare(request))
        num_tokens += len(prepared[-1].request.prompt)
        if num_tokens > MAX_PROMPT_TOKENS:
            message = f"the prompts have more than {MAX_PROMPT_TOKENS:,} tokens; send them in several requests"
            raise ApiError(400, message, "invalid_value", "prompt")
    call.formatter.notes = list(dict.fromkeys(note for request in prepared for note in request.notes))
    return PreparedCall(prepared, call.formatter, call.is_stream)
