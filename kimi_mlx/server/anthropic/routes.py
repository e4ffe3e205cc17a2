"""Routes of Anthropic's API."""

from __future__ import annotations

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kimi_mlx.server.anthropic.request import CountBody, MessagesBody, to_chat_request
from kimi_mlx.server.anthropic.response import MessageFormatter
from kimi_mlx.server.http.body import JsonResponse
from kimi_mlx.server.http.context import Context, read_body
from kimi_mlx.server.http.sse import respond
from kimi_mlx.server.model_info import ModelInfo


def anthropic_routes(context: Context) -> list[Route]:
    """Return the routes of messages and token counting."""
    model_info, service = context.model_info, context.service

    async def messages(request: Request) -> Response:
        body = await read_body(request, MessagesBody)
        formatter = MessageFormatter(_resolve(model_info, body.model))
        return await respond(request, service.answer(to_chat_request(body)), formatter, is_stream=bool(body.stream))

    async def count_tokens(request: Request) -> Response:
        body = await read_body(request, CountBody)
        _resolve(model_info, body.model)
        count = await anyio.to_thread.run_sync(service.prompt_builder.count_tokens, to_chat_request(body))
        return JsonResponse({"input_tokens": count})

    return [
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    ]


def _resolve(model_info: ModelInfo, name: str | None) -> str:
    """Return the model's name for the response; `claude-...` is the served model: tools request such names."""
    return model_info.name if name and name.startswith("claude-") else model_info.resolve(name)
