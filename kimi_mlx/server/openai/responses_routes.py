"""Routes of OpenAI's Responses API: create a response, and get, cancel and delete those that are kept in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kimi_mlx.server.api_types import AnswerEvent, collect
from kimi_mlx.server.errors import ApiError, api_error
from kimi_mlx.server.http.body import JsonResponse
from kimi_mlx.server.http.context import ApiCall, Context, PreparedCall, prepare_call
from kimi_mlx.server.http.security import API_KEY, CLIENT_KEY
from kimi_mlx.server.http.sse import respond
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.openai.compaction import CompactionFormatter, to_compaction_request
from kimi_mlx.server.openai.input_items import list_items, page_of
from kimi_mlx.server.openai.response_store import ResponseStore, StoredResponse, StoredState
from kimi_mlx.server.openai.responses_body import ResponsesBody
from kimi_mlx.server.openai.responses_request import (
    MissingStateError,
    ParsedState,
    read_body,
    read_continued_body,
    read_tools,
    to_chat_request,
    to_kept_request,
)
from kimi_mlx.server.openai.responses_response import ResponseFormatter, cancelled
from kimi_mlx.server.prompts import PromptBuilder
from kimi_mlx.server.service import AnswerHandle

Result = TypeVar("Result")


def responses_routes(context: Context) -> list[Route]:
    """Return the routes of the Responses API."""
    api = ResponsesApi(context, ResponseStore(context.keep_responses))
    return [
        Route("/v1/responses", api.create, methods=["POST"]),
        Route("/v1/responses/input_tokens", api.count_input_tokens, methods=["POST"]),
        Route("/v1/responses/compact", api.compact, methods=["POST"]),
        Route("/v1/responses/{id}", api.retrieve, methods=["GET"]),
        Route("/v1/responses/{id}", api.delete, methods=["DELETE"]),
        Route("/v1/responses/{id}/cancel", api.cancel, methods=["POST"]),
        Route("/v1/responses/{id}/input_items", api.list_input_items, methods=["GET"]),
    ]


@dataclass(eq=False)
class RunningResponse:
    """A response whose answer is not complete.

    Args:
        owner: client that may use it.
        formatter: formatter of the answer.
        handle: handle that ends the answer.
        is_kept: whether the response can be found by its id; False once it is deleted.
    """

    owner: str
    formatter: ResponseFormatter
    handle: AnswerHandle = field(default_factory=AnswerHandle)
    is_kept: bool = True


class ResponsesApi:
    """Handlers of the routes.

    Args:
        context: objects that all routes use.
        store: store of responses.
    """

    def __init__(self, context: Context, store: ResponseStore):
        self._context, self._store = context, store
        self._running: dict[str, RunningResponse] = {}
        self._background: set[asyncio.Task[None]] = set()

    async def create(self, request: Request) -> Response:
        """Create a response, in the background if requested."""
        state, call = await self._prepare(request, partial(_prepare_response, self._context.model_info))
        formatter = call.formatter
        assert isinstance(formatter, ResponseFormatter)
        if formatter.is_background and call.is_stream:
            message = "a response in the background is not streamed: poll GET /v1/responses/{id} instead"
            raise ApiError(400, message, "unsupported_value", "stream")
        running = self._begin(request, formatter, state)
        events = self._context.service.answer(*call.requests, client=request.scope[CLIENT_KEY], handle=running.handle)
        if formatter.is_background:
            task = asyncio.create_task(self._run(running, events))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
            return JsonResponse(formatter.response("queued"))
        try:
            return await respond(request, self._while_running(running, events), formatter, is_stream=call.is_stream)
        except BaseException:  # also if the generator has not begun
            self._running.pop(formatter.id, None)
            raise

    def _begin(self, request: Request, formatter: ResponseFormatter, state: StoredState) -> RunningResponse:
        """Register a running response; it is stored when it ends, unless client or server turned that off."""
        running = RunningResponse(_owner(request), formatter)
        is_kept = formatter.wants_store and self._store.max_responses > 0
        formatter.fields["store"] = is_kept
        if formatter.is_background and not is_kept:
            reason = "this server keeps no responses" if formatter.wants_store else "`store` is false"
            raise ApiError(400, f"`background` needs a response that is kept, but {reason}", param="background")
        if is_kept:
            formatter.on_end = partial(self._keep, running, state)
        self._running[formatter.id] = running
        return running

    def _keep(self, running: RunningResponse, state: StoredState, response: dict[str, Any]) -> None:
        """Store a response that has ended, unless it was deleted meanwhile. Safe from any thread."""
        if not running.is_kept:
            return
        items = {item["id"]: _encode(item) for item in response["output"]}
        fields = _encode(response | {"output": []})
        request = running.formatter.kept_request
        stored = StoredResponse(response["id"], running.owner, request, fields, items, state.references, state.previous)
        self._store.add(stored)

    async def _while_running(
        self, running: RunningResponse, events: AsyncGenerator[AnswerEvent, None]
    ) -> AsyncGenerator[AnswerEvent, None]:
        """Yield the events of an answer; the response counts as running until they end."""
        try:
            async with aclosing(events):
                async for event in events:
                    yield event
        finally:
            self._running.pop(running.formatter.id, None)

    async def _run(self, running: RunningResponse, events: AsyncGenerator[AnswerEvent, None]) -> None:
        """Generate the answer of a response in the background."""
        formatter = running.formatter
        try:
            async with aclosing(events):
                answers = [event async for event in events]
            await anyio.to_thread.run_sync(lambda: formatter.full_response(collect(answers)))
        except Exception as error:  # it is the content of the response
            formatter.failed_response(api_error(error))
        finally:
            self._running.pop(formatter.id, None)

    async def count_input_tokens(self, request: Request) -> Response:
        """Count the tokens of the prompt of a body."""
        _, count = await self._prepare(request, partial(_count_tokens, self._context.model_info))
        return JsonResponse({"object": "response.input_tokens", "input_tokens": count})

    async def compact(self, request: Request) -> Response:
        """Summarize a conversation."""
        _, call = await self._prepare(request, partial(_prepare_compaction, self._context.model_info))
        events = self._context.service.answer(*call.requests, client=request.scope[CLIENT_KEY])
        return await respond(request, events, call.formatter, is_stream=False)

    async def retrieve(self, request: Request) -> Response:
        """Return a response that is running or kept."""
        if request.query_params.get("stream") == "true":
            message = "the events of a response are not kept: leave out `stream`"
            raise ApiError(400, message, "unsupported_value", "stream")
        running = self._find_running(request)
        if running is not None:
            return JsonResponse(running.formatter.response("in_progress", output=[]))
        return JsonResponse(self._find(request).to_dict())

    async def delete(self, request: Request) -> Response:
        """Delete a response. One that is running is not stored when it ends; its stream continues."""
        running = self._find_running(request)
        if running is not None:
            running.is_kept = False
        else:
            self._store.delete(_owner(request), request.path_params["id"])
        return JsonResponse({"id": request.path_params["id"], "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """Cancel a response that is running; one that has ended is returned unchanged."""
        running = self._find_running(request)
        if running is None:
            return JsonResponse(self._find(request).to_dict())
        running.handle.stop(cancelled())
        return JsonResponse(running.formatter.response("cancelled", output=[]))

    async def list_input_items(self, request: Request) -> Response:
        """Return the items from which a response was generated, including those of the responses before it."""
        stored = self._find(request)
        page = page_of(request.query_params)
        state = StoredState(stored.previous, stored.references)
        work = partial(list_items, stored.id)
        items = await self._context.service.prepare(work, state.continued_body(stored.request))
        return JsonResponse(page.select(items))

    def _find(self, request: Request) -> StoredResponse:
        return self._store.find(_owner(request), request.path_params["id"])

    def _find_running(self, request: Request) -> RunningResponse | None:
        running = self._running.get(request.path_params["id"])
        return running if running is not None and running.owner == _owner(request) and running.is_kept else None

    async def _prepare(
        self, request: Request, work: Callable[[bool, PromptBuilder, bytes], Result]
    ) -> tuple[StoredState, Result]:
        """Prepare a request, together with the stored responses that it continues.

        Args:
            request: request.
            work: a `Work` whose first argument is True if the body has been extended by stored responses.

        Raises:
            ApiError: the body is invalid, or continues a response that is not kept.
        """
        try:
            return StoredState(), await self._context.prepare(request, partial(work, False))
        except MissingStateError as error:
            missing = error
        state = self._store.resolve(_owner(request), missing.previous_response_id, missing.item_ids)
        return state, await self._context.prepare(request, partial(work, True), state.continued_body)


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _owner(request: Request) -> str:
    """Return the client whose responses a request may use: one API key, or all clients if the server has no keys."""
    key = request.scope[API_KEY]
    return "" if key is None else f"key {key}"


def _read(is_continued: bool, data: bytes) -> tuple[ResponsesBody, ParsedState]:
    return read_continued_body(ResponsesBody, data) if is_continued else (read_body(ResponsesBody, data), ParsedState())


def read_response(is_continued: bool, builder: PromptBuilder, model_info: ModelInfo, data: bytes) -> ApiCall:
    """Read the body of POST /v1/responses."""
    body, state = _read(is_continued, data)
    model = model_info.resolve(body.model)
    table = read_tools(body, state)
    request = to_chat_request(body, state, table)
    formatter = ResponseFormatter(model, body, table)
    if formatter.wants_store:
        formatter.kept_request = to_kept_request(data, is_continued=is_continued)
    return ApiCall([request], formatter, bool(body.stream))


def _prepare_response(model_info: ModelInfo, is_continued: bool, builder: PromptBuilder, data: bytes) -> PreparedCall:
    return prepare_call(partial(read_response, is_continued), model_info, builder, data)


def _count_tokens(model_info: ModelInfo, is_continued: bool, builder: PromptBuilder, data: bytes) -> int:
    body, state = _read(is_continued, data)
    model_info.resolve(body.model)
    return builder.count_tokens(to_chat_request(body, state))


def _prepare_compaction(model_info: ModelInfo, is_continued: bool, builder: PromptBuilder, data: bytes) -> PreparedCall:
    return prepare_call(partial(_read_compaction, is_continued), model_info, builder, data)


def _read_compaction(is_continued: bool, builder: PromptBuilder, model_info: ModelInfo, data: bytes) -> ApiCall:
    """Read the body of POST /v1/responses/compact."""
    body, state = _read(is_continued, data)
    model_info.resolve(body.model)
    return ApiCall([to_compaction_request(body, state)], CompactionFormatter(state.items(body)), False)
