"""The paths of Anthropic's API."""

from __future__ import annotations

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kimi_mlx.server.anthropic.request import CountBody, MessagesBody, to_chat_request
from kimi_mlx.server.anthropic.response import MessageFormatter
from kimi_mlx.server.http.context import Context, read_body
from kimi_mlx.server.http.sse import respond
from kimi_mlx.server.json_response import JsonResponse
from kimi_mlx.server.model_info import ModelInfo


def anthropic_routes(context: Context) -> list[Route]:
    """Messages, and how many tokens they have."""
    model_info, service = context.model_info, context.service

    async def messages(request: Request) -> Response:
        body = await read_body(request, MessagesBody)
        formatter = MessageFormatter(_model(model_info, body.model))
        return await respond(request, service.answer(to_chat_request(body)), formatter, is_stream=bool(body.stream))

    async def count(request: Request) -> Response:
        body = await read_body(request, CountBody)
        _model(model_info, body.model)
        tokens = await anyio.to_thread.run_sync(service.prompt_builder.count, to_chat_request(body))
        return JsonResponse({"input_tokens": tokens})

    return [
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", count, methods=["POST"]),
    ]


def _model(model_info: ModelInfo, name: str | None) -> str:
    """The name that answers bear. Anthropic's names mean the model that is here: tools ask for them unasked."""
    return model_info.name if name and name.startswith("claude-") else model_info.resolve(name)
