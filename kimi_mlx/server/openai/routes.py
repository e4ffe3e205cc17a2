"""The paths of OpenAI's API."""

from __future__ import annotations

import time
import uuid

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kimi_mlx.server.http.context import Context, read_body
from kimi_mlx.server.http.sse import respond
from kimi_mlx.server.json_response import JsonResponse
from kimi_mlx.server.openai.chat_request import ChatBody
from kimi_mlx.server.openai.chat_response import ChatFormatter
from kimi_mlx.server.openai.completions import CompletionBody, CompletionFormatter


def openai_routes(context: Context) -> list[Route]:
    """Chat, plain completions, and the model."""
    model_info, service = context.model_info, context.service

    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        model = model_info.resolve(body.model)
        ask = body.to_chat_request()
        formatter = ChatFormatter(
            f"chatcmpl-{uuid.uuid4().hex}",
            model,
            int(time.time()),
            include_usage=body.include_usage,
            include_logprobs=bool(body.logprobs),
        )
        return await respond(request, service.answer(ask), formatter, is_stream=bool(body.stream))

    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        model = model_info.resolve(body.model)
        wishes = body.to_completion_requests()
        decode = service.prompt_builder.tokenizer.decode
        echoes = [
            "" if not body.echo else wish.prompt if isinstance(wish.prompt, str) else decode(wish.prompt)
            for wish in wishes
            for _ in range(wish.n)
        ]
        formatter = CompletionFormatter(
            f"cmpl-{uuid.uuid4().hex}", model, int(time.time()), echoes, include_usage=body.include_usage
        )
        return await respond(request, service.answer(*wishes), formatter, is_stream=bool(body.stream))

    async def models(request: Request) -> Response:
        ends = {"has_more": False, "first_id": model_info.name, "last_id": model_info.name}  # as Anthropic's API has it
        return JsonResponse({"object": "list", "data": [model_info.to_dict()], **ends})

    async def model(request: Request) -> Response:
        model_info.resolve(request.path_params["name"])
        return JsonResponse(model_info.to_dict())

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]
