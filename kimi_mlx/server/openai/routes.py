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
from kimi_mlx.server.openai.chat_response import ChatTranslation
from kimi_mlx.server.openai.completions import CompletionBody, CompletionTranslation


def openai_routes(context: Context) -> list[Route]:
    """Chat, plain completions, and the model."""
    served, service = context.served, context.service

    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        model = served.check(body.model)
        ask = body.ask()
        translation = ChatTranslation(
            f"chatcmpl-{uuid.uuid4().hex}",
            model,
            int(time.time()),
            wants_usage=body.wants_usage,
            wants_logprobs=bool(body.logprobs),
        )
        return await respond(request, service.answer(ask), translation, is_stream=bool(body.stream))

    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        model = served.check(body.model)
        wishes = body.continuations()
        decode = service.model.tokenizer.decode
        echoes = [
            "" if not body.echo else wish.prompt if isinstance(wish.prompt, str) else decode(wish.prompt)
            for wish in wishes
            for _ in range(wish.n)
        ]
        translation = CompletionTranslation(
            f"cmpl-{uuid.uuid4().hex}", model, int(time.time()), echoes, wants_usage=body.wants_usage
        )
        return await respond(request, service.answer(*wishes), translation, is_stream=bool(body.stream))

    async def models(request: Request) -> Response:
        ends = {"has_more": False, "first_id": served.name, "last_id": served.name}  # as Anthropic's API has it
        return JsonResponse({"object": "list", "data": [served.to_dict()], **ends})

    async def model(request: Request) -> Response:
        served.check(request.path_params["name"])
        return JsonResponse(served.to_dict())

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]
