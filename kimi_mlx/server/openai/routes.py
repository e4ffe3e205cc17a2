"""Routes of OpenAI's APIs."""

from __future__ import annotations

import time
import uuid

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kimi_mlx.server.http.body import JsonResponse
from kimi_mlx.server.http.context import Context, read_body
from kimi_mlx.server.http.sse import respond
from kimi_mlx.server.openai.chat_request import ChatBody
from kimi_mlx.server.openai.chat_response import ChatFormatter
from kimi_mlx.server.openai.completions import CompletionBody, CompletionFormatter
from kimi_mlx.server.openai.responses_request import ResponsesBody, to_chat_request
from kimi_mlx.server.openai.responses_response import ResponseFormatter


def openai_routes(context: Context) -> list[Route]:
    """Return the routes of chat completions, plain completions, responses and models."""
    model_info, service = context.model_info, context.service

    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        model = model_info.resolve(body.model)
        chat_request = body.to_chat_request()
        formatter = ChatFormatter(
            f"chatcmpl-{uuid.uuid4().hex}",
            model,
            int(time.time()),
            include_usage=body.include_usage,
            include_logprobs=bool(body.logprobs),
        )
        return await respond(request, service.answer(chat_request), formatter, is_stream=bool(body.stream))

    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        model = model_info.resolve(body.model)
        completion_requests = body.to_completion_requests()
        decode = service.prompt_builder.tokenizer.decode
        echoes = [
            "" if not body.echo else prompt if isinstance(prompt, str) else decode(prompt)
            for prompt, n in ((completion.prompt, completion.n) for completion in completion_requests)
            for _ in range(n)
        ]
        formatter = CompletionFormatter(
            f"cmpl-{uuid.uuid4().hex}", model, int(time.time()), echoes, include_usage=body.include_usage
        )
        return await respond(request, service.answer(*completion_requests), formatter, is_stream=bool(body.stream))

    async def responses(request: Request) -> Response:
        body = await read_body(request, ResponsesBody)
        formatter = ResponseFormatter(model_info.resolve(body.model), body)
        events = service.answer(to_chat_request(body))
        return await respond(request, events, formatter, is_stream=bool(body.stream))

    async def models(request: Request) -> Response:
        # the last three fields are those of Anthropic's API, which has the same path
        page = {"has_more": False, "first_id": model_info.name, "last_id": model_info.name}
        return JsonResponse({"object": "list", "data": [model_info.to_dict()], **page})

    async def model(request: Request) -> Response:
        model_info.resolve(request.path_params["name"])
        return JsonResponse(model_info.to_dict())

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]
